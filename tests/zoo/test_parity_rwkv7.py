"""RWKV-7 against its author's package, state by state, and against the published formulas in float64, every gradient.

Letters: T time, D d_model, H heads, K head width.
"""

import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import zoo

LOW_RANK = {"w": "decay", "a": "rate", "v": "residual", "g": "gate"}
MIXES = "rwkvag"
SIZES = {
    "plain": {"d_model": 32, "head_dim": 16, "n_layers": 2},
    "odd sizes": {"d_model": 33, "head_dim": 11, "n_layers": 3, "d_ff": 50, "decay_rank": 5, "rate_rank": 7},
    "one layer": {"d_model": 16, "head_dim": 16, "n_layers": 1, "value_rank": 3, "gate_rank": 9},
}


def make(**settings) -> zoo.Model:
    """A model whose parameters all matter: the published initialisation silences many of them."""
    torch.manual_seed(2)
    model = zoo.create_model("rwkv7", vocab_size=29, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim >= 2 else 0.1
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def author_names(model: zoo.Model) -> dict[str, Tensor]:
    """Our parameters under the names and in the layout of the author's files; views, so that gradients flow back."""
    p = dict(model.named_parameters())
    named = {"emb.weight": p["embedding.weight"], "head.weight": p["head.weight"]}
    norms = {"blocks.0.ln0": "embedding_norm", "ln_out": "norm"}
    for i in range(model.config.n_layers):
        ours, theirs = f"blocks.{i}.mixers.0.", f"blocks.{i}.att."
        norms |= {f"blocks.{i}.ln1": f"blocks.{i}.norms.0", f"blocks.{i}.ln2": f"blocks.{i}.norms.1"}
        for letter, mu in zip(MIXES, p[ours + "shift.mu"], strict=True):
            named[f"{theirs}x_{letter}"] = mu[None, None]
        for letter, part in LOW_RANK.items():
            if f"{ours}{part}.down" in p:
                named[f"{theirs}{letter}1"] = p[f"{ours}{part}.down"].T
                named[f"{theirs}{letter}2"] = p[f"{ours}{part}.up"].T
            if f"{ours}{part}.bias" in p:
                named[f"{theirs}{letter}0"] = p[f"{ours}{part}.bias"][None, None]
        for name in ("k_k", "k_a"):
            named[theirs + name] = p[ours + name][None, None]
        named[theirs + "r_k"] = p[ours + "r_k"]
        for name in ("receptance", "key", "value", "output"):
            named[f"{theirs}{name}.weight"] = p[f"{ours}{name}.weight"]
        named |= {f"{theirs}ln_x.{kind}": p[f"{ours}norm_{kind}"] for kind in ("weight", "bias")}
        ours, theirs = f"blocks.{i}.mixers.1.", f"blocks.{i}.ffn."
        named[theirs + "x_k"] = p[ours + "shift.mu"][None]
        named |= {f"{theirs}{name}.weight": p[f"{ours}{name}.weight"] for name in ("key", "value")}
    return named | {
        f"{theirs}.{kind}": p[f"{ours}.{kind}"] for theirs, ours in norms.items() for kind in ("weight", "bias")
    }


def published(z: dict[str, Tensor], tokens: list[int], n_layers: int) -> Tensor:
    """The formulas of the paper, token by token over matrices; (T, V)."""
    heads, width = z["blocks.0.att.r_k"].shape

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape, z[name + ".weight"], z[name + ".bias"], eps=1e-5)

    zero = torch.zeros_like(z["emb.weight"][0])
    before = {(i, part): zero for i in range(n_layers) for part in ("att", "ffn")}
    states = [torch.zeros(heads, width, width, dtype=zero.dtype) for _ in range(n_layers)]
    logits = []
    for token in tokens:
        x = norm(z["emb.weight"][token], "blocks.0.ln0")
        for i in range(n_layers):
            w = {name.removeprefix(f"blocks.{i}.att."): value.squeeze() for name, value in z.items()}
            h = norm(x, f"blocks.{i}.ln1")
            r_, w_, k_, v_, a_, g_ = (h + (before[i, "att"] - h) * w[f"x_{m}"] for m in MIXES)
            before[i, "att"] = h
            r, k, v = w["receptance.weight"] @ r_, w["key.weight"] @ k_, w["value.weight"] @ v_
            decay = w["w0"] + torch.tanh(w_ @ w["w1"]) @ w["w2"]
            decay = torch.exp(-torch.exp(-F.softplus(-decay) - 0.5)).view(heads, width)
            if i == 0:
                first = v
            else:
                v = v + (first - v) * torch.sigmoid(w["v0"] + v_ @ w["v1"] @ w["v2"])
            a = torch.sigmoid(w["a0"] + a_ @ w["a1"] @ w["a2"])
            g = torch.sigmoid(g_ @ w["g1"]) @ w["g2"]
            kappa = (k * w["k_k"]).view(heads, width)
            kappa = kappa / kappa.square().sum(-1, keepdim=True).sqrt()
            k = k * (1 + (a - 1) * w["k_a"])
            r, k, v, a = (t.view(heads, width) for t in (r, k, v, a))
            s = states[i]
            removed = (s @ kappa[..., None]) * (kappa * a)[:, None]  # (H, K, 1) (H, 1, K)
            states[i] = s * decay[:, None] - removed + v[..., None] * k[:, None]
            y = (states[i] @ r[..., None])[..., 0]  # (H, K)
            mean, var = y.mean(-1, keepdim=True), y.var(-1, keepdim=True, unbiased=False)
            y = ((y - mean) / (var + 64e-5).sqrt()).flatten() * w["ln_x.weight"] + w["ln_x.bias"]
            y = y + ((r * k * z[f"blocks.{i}.att.r_k"]).sum(-1, keepdim=True) * v).flatten()
            x = x + w["output.weight"] @ (y * g)
            h = norm(x, f"blocks.{i}.ln2")
            mixed = h + (before[i, "ffn"] - h) * z[f"blocks.{i}.ffn.x_k"].squeeze()
            before[i, "ffn"] = h
            x = x + z[f"blocks.{i}.ffn.value.weight"] @ (z[f"blocks.{i}.ffn.key.weight"] @ mixed).relu().square()
        logits.append(z["head.weight"] @ norm(x, "ln_out"))
    return torch.stack(logits)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_published_formulas_with_every_gradient(size) -> None:
    model = make(**size).double()
    tokens, targets = torch.randint(29, (1, 13)), torch.randint(29, (13,))
    parameters = list(model.parameters())
    logits = model(tokens).logits[0]
    expected = published(author_names(model), tokens[0].tolist(), size["n_layers"])
    # The decay is rounded to float32 on its way into the operator, whatever the model's precision.
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    actual, wanted = (torch.autograd.grad(F.cross_entropy(x, targets), parameters) for x in (logits, expected))
    for (name, _), a, e in zip(model.named_parameters(), actual, wanted, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5 * e.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def authors_package():
    """The `rwkv` package, which reads its switches from the environment when it is imported."""
    patch = pytest.MonkeyPatch()
    for key, value in {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}.items():
        patch.setenv(key, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from rwkv.model import RWKV
    yield RWKV
    patch.undo()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the package decorates with torch.jit
def test_the_authors_package_state_by_state(authors_package, tmp_path) -> None:
    model = make(d_model=32, head_dim=16, n_layers=3)
    weights = {name: value.detach().contiguous() for name, value in author_names(model).items()}
    torch.save(weights, tmp_path / "model.pth")
    theirs = authors_package(str(tmp_path / "model"), "cpu fp32")
    tokens = torch.randint(29, (1, 24))
    state, their_state = model.init_state(1), None
    for piece in (tokens[:, :17], tokens[:, 17:18], tokens[:, 18:]):
        with torch.no_grad():
            out = model(piece, state=state)
        state = out.state
        expected, their_state = theirs.forward(piece[0].tolist(), their_state, full_output=True)
        torch.testing.assert_close(out.logits[0], expected.view_as(out.logits[0]), rtol=1e-4, atol=1e-5)
        for i, (time_mix, channel_mix) in enumerate(state.layers):
            held = (time_mix.last, time_mix.wkv, channel_mix.last)
            for ours, other in zip(held, their_state[3 * i : 3 * i + 3], strict=True):
                torch.testing.assert_close(ours[0], other, rtol=1e-4, atol=1e-5)
