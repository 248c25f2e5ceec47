r"""HiPPO: a function of time held in the first coefficients of an orthonormal basis.

.. math:: c_m = \int f(x) \phi_m(x) \, dx, \qquad \phi_m(x) = g_m(x) \, \mu(x), \qquad m = 0, \dots, M - 1

with functions :math:`g_m` that are orthonormal under the measure :math:`\mu`, which says what is remembered. LegS
remembers all of an interval :math:`[t_0, T]` (start and horizon) alike; LegT and FouT remember a window
:math:`[t - \theta, t]` that moves along, by polynomials and by waves; LagT remembers less and less of what lies further
back, with a time constant :math:`\tau`.

Every measure has a basis, quadrature nodes and weights, and the matrices of its differential equation. For LegS two
more routes lead to the same numbers: a recurrence that follows a growing horizon step by step (there time is measured
from the start), and a closed form in the frequency domain.

Pure functions on tensors. Two conventions serve throughout: any floating dtype may come in, float64 comes out; and
axis 0 of a result counts the modes m, whatever shape the rest has.
"""

from gpseq.hippo.frequency import (
    legs_fourier,
    rbf_spectral_quadrature,
    spectral_cross,
    spectral_kuf,
    spectral_kuu,
    spherical_bessel,
)
from gpseq.hippo.legs import (
    legs_basis,
    legs_cell_weights,
    legs_kuu_ode,
    legs_nodes,
    legs_recurrence,
    legs_reprojection,
    legs_step,
    legs_transition,
    legs_weights,
)
from gpseq.hippo.polynomials import gauss_laguerre, gauss_legendre, laguerre, laguerre_functions, legendre
from gpseq.hippo.sliding import (
    fout_basis,
    fout_nodes,
    fout_transition,
    fout_weights,
    lagt_basis,
    lagt_nodes,
    lagt_transition,
    lagt_weights,
    legt_basis,
    legt_nodes,
    legt_transition,
    legt_weights,
)

__all__ = [
    "fout_basis",
    "fout_nodes",
    "fout_transition",
    "fout_weights",
    "gauss_laguerre",
    "gauss_legendre",
    "lagt_basis",
    "lagt_nodes",
    "lagt_transition",
    "lagt_weights",
    "laguerre",
    "laguerre_functions",
    "legendre",
    "legs_basis",
    "legs_cell_weights",
    "legs_fourier",
    "legs_kuu_ode",
    "legs_nodes",
    "legs_recurrence",
    "legs_reprojection",
    "legs_step",
    "legs_transition",
    "legs_weights",
    "legt_basis",
    "legt_nodes",
    "legt_transition",
    "legt_weights",
    "rbf_spectral_quadrature",
    "spectral_cross",
    "spectral_kuf",
    "spectral_kuu",
    "spherical_bessel",
]
