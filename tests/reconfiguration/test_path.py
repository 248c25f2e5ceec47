"""States of a teacher: those of a forward by hand, for every host; and nothing of the teacher changes."""

import pytest
import torch
from torch import nn

from gpseq.reconfiguration import capture, find_stack, transitions
from tests.oracles_reconfiguration import (
    BATCH,
    FUTURE,
    HOSTS,
    LENGTH,
    PADDING,
    WIDTH,
    Classifier,
    hidden_keys,
    moved,
    states_by_hand,
)

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def seen_tokens(host):
    """Tokens that count: of padding, a query may see nothing, and give anything."""
    return ~host.hidden.all(-1)


@pytest.mark.parametrize("name", list(HOSTS))
def test_states_are_those_of_a_forward_by_hand(name, dtype):
    host = HOSTS[name](dtype)
    path = capture(host.model, host.inputs)
    assert len(path) == 3
    assert [state.dtype for state in path.states] == [dtype] * 4
    host.hidden = host.hidden if path.states[0].shape[:2] == (BATCH, LENGTH) else hidden_keys()
    for state, want in zip(path.states, states_by_hand(host, path.stack.blocks), strict=True):
        assert state.shape == want.shape
        seen = seen_tokens(host)
        torch.testing.assert_close(state[seen], want[seen], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("points", ["attention", "block"])
@pytest.mark.parametrize("name", list(HOSTS))
def test_transitions_give_the_states(name, points):
    host = HOSTS[name](torch.float64)
    for first in (0, 1):
        path = capture(host.model, host.inputs, points, first)
        assert len(path) == 3 - first
        for step, x, want in zip(transitions(path), path.states[:-1], path.states[1:], strict=True):
            torch.testing.assert_close(step(x), want, rtol=0, atol=1e-12)
            assert not step.training


def test_states_at_block_boundaries_are_what_blocks_return():
    model = moved(Classifier(norm_first=True))
    x = torch.randn(2, LENGTH, 3, dtype=torch.float64)
    path = capture(model, x, "block")
    h = model.embed(x)
    for state, block in zip(path.states[1:], model.encoder.layers, strict=True):
        h = block(h)
        torch.testing.assert_close(state, h, rtol=0, atol=1e-12)
    assert path.stack.kind is None
    later = capture(model, x, "block", 2)
    assert len(later) == 1 and later.states[0].equal(path.states[2])


def test_masks_are_those_of_the_host():
    kinds = {
        "torch pre": (None, False),
        "torch post padded": (PADDING, False),
        "torch pre causal padded": (PADDING, True),
        "torch time first": (PADDING, False),
        "vit": (None, False),
        "bert": (None, False),
        "bert padded": (PADDING, False),
        "bert eager padded": (PADDING, False),
        "gpt2": (None, True),
        "gpt2 padded": (PADDING, True),
        "gpt2 left": (PADDING.flip(1), True),
        "gpt2 eager left": (PADDING.flip(1), True),
        "timm": (None, False),
        "timm causal": (None, True),
        "timm masked": (None, True),
    }
    for name, (padding, causal) in kinds.items():
        host = HOSTS[name](torch.float64)
        path = capture(host.model, host.inputs)
        if padding is None:
            assert path.padding is None or not path.padding.any(), name
        else:
            assert path.padding.equal(padding), name
        given = path.masks.for_attention(path.states[0], 2)
        hidden = torch.zeros(BATCH, 2, *path.states[0].shape[1:2] * 2).bool()
        if given["key_padding_mask"] is not None:
            hidden = hidden | given["key_padding_mask"][:, None, None]
        if given["attn_mask"] is not None:
            mask = given["attn_mask"]
            hidden = hidden | ((mask if mask.dim() == 2 else mask.unflatten(0, (BATCH, 2))) == -torch.inf)
        tokens = path.states[0].shape[1]
        want = hidden_keys(padding, causal) if tokens == LENGTH and (causal or padding is not None) else None
        seen = slice(None) if padding is None else ~padding
        if want is not None:
            assert hidden[:, 0][seen].equal(want[seen]), name
        else:
            assert not hidden.any(), name


def test_a_decoder_is_causal_without_a_mask():
    transformers = pytest.importorskip("transformers", minversion="5")
    from tests.oracles_reconfiguration import TEXT

    model = transformers.BertModel(transformers.BertConfig(**TEXT, is_decoder=True)).eval()
    assert capture(model, {"input_ids": torch.randint(4, 20, (2, 5))}).masks.causal


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("name", list(HOSTS))
def test_capture_changes_nothing(name):
    host = HOSTS[name](torch.float32)
    before = {key: value.clone() for key, value in host.model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        want = host.logits()
        path = capture(host.model, host.inputs)
        output = path.output if isinstance(path.output, torch.Tensor) else path.output.logits
    torch.testing.assert_close(output, want, rtol=1e-5, atol=1e-5)
    assert torch.get_rng_state().equal(state)
    assert all(value.equal(before[key]) for key, value in host.model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in host.model.modules())
    assert not any(part.training for part in host.model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_the_fused_path_hides_nothing():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=True)
    model = moved(nn.TransformerEncoder(layer, 3, enable_nested_tensor=True), torch.float32)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        path = capture(model, x, src_key_padding_mask=PADDING)
        want = model(x, src_key_padding_mask=PADDING)
    assert all(not state.is_nested and state.shape == x.shape for state in path.states)
    torch.testing.assert_close(path.output[~PADDING], want[~PADDING], rtol=1e-4, atol=1e-5)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        capture(model, x)
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = Classifier().encoder.layers

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        raise FloatingPointError("at the end")


def test_hooks_are_gone_after_an_exception():
    model = Failing().eval()
    with pytest.raises(FloatingPointError, match="at the end"):
        capture(model, torch.randn(2, 3, WIDTH))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


class Steps(nn.Module):
    """Blocks of a kind of their own, and how they are called."""

    def __init__(self, make, call=None, depth=3):
        super().__init__()
        self.blocks = nn.ModuleList(make(number) for number in range(depth))
        self.call = call or (lambda block, x: block(x))

    def forward(self, x):
        for block in self.blocks:
            x = self.call(block, x)
        return x


class Step(nn.Module):
    def __init__(self, number=0, width=4):
        super().__init__()
        self.linear = nn.Linear(4, width)

    def forward(self, tokens, scale=1.0):
        return tokens + scale * torch.tanh(self.linear(tokens))


class InPlace(Step):
    def forward(self, tokens):
        return tokens.add_(torch.tanh(self.linear(tokens)))


class Two(Step):
    def forward(self, tokens):
        return super().forward(tokens), None


class Hides(Step):
    def forward(self, tokens, odd_mask=None, key_padding_mask=None):
        return super().forward(tokens)


def test_what_blocks_change_in_place_is_seen_before():
    model = Steps(InPlace).eval()
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        path = capture(model, x.clone(), "block")
        h = x.clone()
        for state, block in zip(path.states, model.blocks, strict=False):
            assert state.equal(h)
            h = block(h.clone())
    assert path.states[-1].equal(h)


def test_arguments_of_blocks_are_known_by_name():
    x = torch.randn(2, 3, 4)
    for call in (lambda b, x: b(x, 0.5), lambda b, x: b(scale=0.5, tokens=x), lambda b, x: b(x, scale=0.5)):
        model = Steps(Step, call).eval()
        path = capture(model, x, "block")
        assert path.calls[0].named(model.blocks[0]) == {"scale": 0.5}
        torch.testing.assert_close(transitions(path)[1](path.states[1]), path.states[2])


def test_masks_of_blocks_of_any_kind():
    padding = torch.tensor([[False, True, True], [False, False, False]])
    model = Steps(Hides, lambda b, x: b(x, key_padding_mask=padding)).eval()
    assert capture(model, torch.randn(2, 3, 4), "block").padding.equal(padding)
    model = Steps(Hides, lambda b, x: b(x, odd_mask=padding)).eval()
    with pytest.raises(NotImplementedError, match="odd_mask"):
        capture(model, torch.randn(2, 3, 4), "block")


def test_named_points():
    model = moved(Classifier())
    x = torch.randn(2, LENGTH, 3, dtype=torch.float64)
    every = capture(model, x, "block")
    for points in ("encoder.layers", ["encoder.layers"], ["encoder.layers.0", "encoder.layers.1", "encoder.layers.2"]):
        assert all(one.equal(two) for one, two in zip(capture(model, x, points).states, every.states, strict=True))
    part = capture(model, x, ("encoder.layers.1", "encoder.layers.2"))
    assert all(one.equal(two) for one, two in zip(part.states, every.states[1:], strict=True))
    assert capture(model, x, find_stack(model, first_block=1)).states[0].equal(every.states[1])


def test_a_teacher_that_trains():
    model = Classifier().train()
    with pytest.raises(ValueError, match="teacher: expected a model in eval mode, got the model itself in train mode"):
        capture(model, torch.randn(2, LENGTH, 3))
    model.eval().encoder.layers[1].dropout1.train()
    with pytest.raises(ValueError, match=r"got encoder\.layers\.1\.dropout1 in train mode"):
        capture(model, torch.randn(2, LENGTH, 3))
    with pytest.raises(TypeError, match="teacher: expected a torch module, got function"):
        capture(lambda x: x, torch.randn(2))


class Pooled(nn.Module):
    """Half of the tokens after the second block."""

    def __init__(self):
        super().__init__()
        self.layers = Classifier(norm_first=True).encoder.layers

    def forward(self, x, tokens=2):
        for number, layer in enumerate(self.layers):
            x = layer(x[:, : tokens if number == 2 else None])
        return x


def test_states_of_unequal_shape_name_the_module():
    x = torch.randn(2, 4, WIDTH)
    with pytest.raises(ValueError, match=r"states of one shape, got \(2, 2, 8\) at layers\.2 after \(2, 4, 8\)"):
        capture(Pooled().eval(), x)
    assert len(capture(Pooled().eval(), x, first_block=2)) == 1
    with pytest.raises(ValueError, match=r"tokens \(B, T, D\) at the input of layers\.0, got \(4, 8\)"):
        capture(Pooled().eval(), {"x": x[0], "tokens": 8})


def test_blocks_that_are_called_twice_or_never():
    twice = Steps(Step, lambda block, x: block(block(x))).eval()
    with pytest.raises(RuntimeError, match=r"expected blocks\.0 to be called once, got 2 calls"):
        capture(twice, torch.randn(2, 3, 4), "block")
    never = Steps(Step, lambda block, x: x).eval()
    with pytest.raises(RuntimeError, match=r"expected blocks\.0 to be called once, got 0 calls"):
        capture(never, torch.randn(2, 3, 4), "block")
    one = Step()
    shared = Steps(lambda number: one).eval()
    with pytest.raises(RuntimeError, match="called once, got 3 calls"):
        capture(shared, torch.randn(2, 3, 4), "block")


def test_blocks_that_return_tuples():
    model = Steps(Two, lambda block, x: block(x)[0]).eval()
    with pytest.raises(ValueError, match=r"expected blocks\.0 to return a tensor, got tuple"):
        capture(model, torch.randn(2, 3, 4), "block")

    class Layer(nn.TransformerEncoderLayer):
        def forward(self, src):
            return super().forward(src), None

    made = Steps(lambda number: Layer(4, 2, batch_first=True), lambda block, x: block(x)[0]).eval()
    with pytest.raises(ValueError, match=r"expected blocks\.0 to return a tensor, got tuple"):
        capture(made, torch.randn(2, 3, 4))


def test_caches_are_not_filled_twice():
    host = HOSTS["gpt2"](torch.float64)
    host.model.config.use_cache = True
    path = capture(host.model, host.inputs, "block")
    assert path.output.past_key_values is not None
    assert path.output.past_key_values.get_seq_length() == LENGTH
    for step, x, want in zip(transitions(path), path.states[:-1], path.states[1:], strict=True):
        torch.testing.assert_close(step(x), want, rtol=0, atol=1e-12)
    assert path.output.past_key_values.get_seq_length() == LENGTH


def test_a_future_mask_reaches_the_path():
    host = HOSTS["torch pre causal padded"](torch.float64)
    path = capture(host.model, host.inputs)
    assert path.masks.causal or path.masks.pairs is not None
    assert FUTURE.equal(path.masks.pairs == -torch.inf if path.masks.pairs.is_floating_point() else path.masks.pairs)


def test_a_second_sequence_is_refused():
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2).eval()
    with pytest.raises(NotImplementedError, match=r"teacher: expected blocks that see their own tokens only .*memory"):
        capture(decoder, torch.randn(2, 3, 8), "block", memory=torch.randn(2, 4, 8))
