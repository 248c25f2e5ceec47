"""Sphinx configuration. The build needs no network: see ``write_inventory``."""

import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import gpseq

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.config import Config

HERE = Path(__file__).parent

project = "gpseq"
author = "the gpseq authors"
copyright = "2026, the gpseq authors"
version = release = gpseq.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "myst_parser",
]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"gpseq {version}"

nitpicky = True
# Type variables.
nitpick_ignore = [
    ("py:class", "gpseq.precision.Result"),
    *(("py:class", name) for name in ("Dataset", "FrameRule")),
    # Torch's inventory knows neither the module nor where the class comes from.
    *(("py:class", f"{home}.ProcessGroup") for home in ("dist", "torch.distributed.distributed_c10d")),
    *((role, name) for role in ("py:class", "py:obj") for name in ("State", "gpseq.variational.belief.State")),
]
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source", "Shape"]

# Where names from other projects lead; the names themselves are listed in inventories/<key>.txt.
SITES = {
    "python": "https://docs.python.org/3/",
    "numpy": "https://numpy.org/doc/stable/",
    "matplotlib": "https://matplotlib.org/stable/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "gpytorch": "https://docs.gpytorch.ai/en/stable/",
    "botorch": "https://botorch.readthedocs.io/en/stable/",
    "linear_operator": "https://linear-operator.readthedocs.io/en/stable/",
}


def write_inventory(project: str, listing: Path, target: Path) -> None:
    """Turn a list of names into the inventory that intersphinx reads.

    The other projects' own inventories would be fetched at each build, and fail without a network. We refer to few
    names, so we list them: one ``name role uri`` a line, where a ``$`` at the end of the uri stands for the name.
    Each name is also entered by its last part, which is all that autodoc sees of what a module imports for the type
    checker only.
    """
    lines = [line.split() for line in listing.read_text(encoding="utf-8").splitlines()]
    entries = []
    for name, role, uri in (line for line in lines if line and line[0] != "#"):
        uri = uri.replace("$", name)
        entries += [f"{alias} {role} 1 {uri} -\n" for alias in dict.fromkeys((name, name.rpartition(".")[2]))]
    header = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
    header += "# The remainder of this file is compressed using zlib.\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(header.encode() + zlib.compress("".join(entries).encode()))


def write_inventories(app: "Sphinx", config: "Config") -> None:
    """Write all inventories into the build folder and point intersphinx at them."""
    config.intersphinx_mapping = {}
    for name, site in SITES.items():
        target = Path(app.doctreedir) / "inventories" / f"{name}.inv"
        write_inventory(name, HERE / "inventories" / f"{name}.txt", target)
        config.intersphinx_mapping[name] = (site, str(target))


def setup(app: "Sphinx") -> None:
    """Run before intersphinx looks at its mapping (its own listener has priority 800)."""
    app.connect("config-inited", write_inventories)
