"""What holds for all nine model files alike: no preset waits for the device, bfloat16 works, no value of a
field ends in a traceback, a batch is its items, every draw has its generator.

Needs the model files, torch, numpy and pytest. The files are those beside this folder, or in MODELS_ROOT.
"""
import ast
import dataclasses
import functools
import importlib.util
import io
import itertools
import linecache
import math
import os
import re
import sys
import tokenize
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(os.environ.get("MODELS_ROOT") or Path(__file__).parent.parent).resolve()
FILES = ("ddpm", "flow_matching", "dp_cnn", "dp_transformer", "dit", "dit_policy", "rdt", "pi0", "pi05")
POLICIES = ("dp_cnn", "dp_transformer", "dit_policy", "rdt", "pi0", "pi05")
aten = torch.ops.aten


@functools.lru_cache
def load(name):
    """The model file as a module of its own, whatever else is called `name`."""
    spec = importlib.util.spec_from_file_location(f"all_models_{name}", ROOT / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- small models that use every part of a file
POINTS = dict(n_classes=3, width=16, depth=2)
PIXELS = dict(data_shape=(3, 8, 8), n_classes=3, channels=8, channel_mult=(1, 2), attn_resolutions=(4,),
              norm_groups=4)
CHAIN = dict(n_diffusion_steps=20, sampler_steps=4)
CHUNK = dict(action_dim=2, state_dim=3, horizon=8, n_action_steps=4)
RESNET = dict(obs="image", n_cameras=2, image_size=(72, 104), resnet_widths=(16, 16, 16, 32), n_keypoints=4,
              crop_size=(64, 96))
CNN = CHUNK | CHAIN | dict(down_dims=(16, 32), step_embed_dim=16)
TRANSFORMER = CHUNK | CHAIN | dict(width=16, depth=2, n_heads=2)
DIT = dict(data_shape=(3, 8, 8), n_classes=3, width=16, depth=2, n_heads=2, n_diffusion_steps=50,
           sampler_steps=4, vae_channels=(), clip_x0=True)
DIT_POLICY = CHUNK | CHAIN | dict(
    n_cameras=2, image_size=(32, 40), n_obs_steps=2, text_len=6, text_width=8, resnet_widths=(8, 16),
    n_groups=4, crop_size=(24, 32), width=16, depth=2, n_heads=2, mlp=32, time_dim=16, n_draws=2)
VIT = dict(vit_size=16, patch_size=8, vit_width=16, vit_depth=1, vit_mlp=32, vit_heads=2)
RDT = CHAIN | VIT | dict(
    horizon=8, n_action_steps=4, image_size=(20, 24), text_len=6, t5_width=16, t5_depth=1, t5_heads=2,
    t5_head_dim=8, t5_mlp=32, width=16, depth=2, n_heads=2, n_draws=2)
PACKED = dict(action_names=(), state_names=(), action_dim=128, state_dim=128)
PI0 = CHUNK | VIT | dict(
    image_size=(20, 24), text_len=6, depth=2, n_heads=2, n_kv_heads=1, head_dim=8, width=16, mlp=32,
    expert_width=12, expert_mlp=24, n_draws=2, sampler_steps=4, text_share=0.5)

CASES = {
    "ddpm-points": POINTS | CHAIN | dict(sampler="ddim", prediction_type="v"),
    "ddpm-images": PIXELS | CHAIN | dict(sampler="ddim", variance="learned"),
    "ddpm-ancestral": POINTS | CHAIN | dict(prediction_type="x0"),
    "flow_matching-points": POINTS | dict(sampler_steps=4, guidance=2.0),
    "flow_matching-images": PIXELS | dict(sampler_steps=4),
    "dp_cnn-lowdim": CNN,
    "dp_cnn-images": CNN | RESNET,
    "dp_cnn-inpaint": CNN | RESNET | dict(conditioning="inpaint"),
    "dp_cnn-ancestral": CNN | dict(sampler="ddpm", prediction_type="x0", pred_action_steps_only=True),
    "dp_transformer-lowdim": TRANSFORMER,
    "dp_transformer-images": TRANSFORMER | RESNET,
    "dp_transformer-inpaint": TRANSFORMER | RESNET | dict(conditioning="inpaint"),
    "dp_transformer-bert": TRANSFORMER | dict(conditioning="inpaint", arch="bert", prediction_type="x0"),
    "dp_transformer-ancestral": TRANSFORMER | dict(sampler="ddpm", cond_depth=1, pred_action_steps_only=True),
    "dit-pixels": DIT,
    "dit-latents": DIT | dict(vae_channels=(8, 16), vae_groups=4, latent_scale=0.5),
    "dit-ancestral": DIT | dict(sampler="ddpm", conditioning="cross_attention"),
    "dit-in_context": DIT | dict(conditioning="in_context", learn_variance=False),
    "dit-adaln": DIT | dict(conditioning="adaln"),
    "dit_policy-images": DIT_POLICY,
    "dit_policy-embedding": DIT_POLICY | dict(text_dim=5, text_len=0, share_encoder=True,
                                              prediction_type="eps"),
    "dit_policy-lowdim": DIT_POLICY | dict(obs="lowdim", n_cameras=0, text_len=0, crop_size=()),
    "rdt-images": RDT,
    "rdt-packed": RDT | PACKED | dict(masked=False, norm="released", max_cameras=3),
    "rdt-embeddings": RDT | dict(encoders="none"),
    "pi0-images": PI0,
    "pi0-padded": PI0 | dict(padded_dim=5, n_draws=1, text_weight=0.0),
    "pi05-images": PI0,
    "pi05-padded": PI0 | dict(padded_dim=5, n_draws=1, text_weight=0.0),
}
FIRST = {name: next(case for case in CASES if case.split("-")[0] == name) for name in FILES}
each_file = pytest.mark.parametrize("name", FILES)
each_case = pytest.mark.parametrize("case", CASES)
each_first = pytest.mark.parametrize("case", FIRST.values())


def make_config(case, **changes):
    return load(case.split("-")[0]).Config(**CASES[case] | changes)


def make_model(case, seed=0, **changes):
    """A model whose weights are random and not small: zeros, and next to zeros, hide what they multiply."""
    torch.manual_seed(seed)
    model = load(case.split("-")[0]).Model(make_config(case, **changes))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and (p == p.flatten()[0]).all():
                p.add_(0.2 * torch.randn_like(p))
            elif p.requires_grad and p.std() < 0.1:
                p.mul_(0.2 / p.std())
    return model


def make_batch(config, B, seed=0, device="cpu"):
    """Items that differ in everything: states, pictures, cameras, instructions, lengths of the real chunk."""
    g = torch.Generator().manual_seed(seed)
    uniform = lambda *shape: torch.rand(shape, generator=g) * 2 - 1
    get = lambda field: getattr(config, field, 0)
    if get("data_shape"):
        batch = {"x": uniform(B, *config.data_shape)}
        if config.n_classes:
            batch["label"] = torch.arange(B) % config.n_classes
        return {key: value.to(device) for key, value in batch.items()}
    Tp, n = config.pred_horizon, config.n_obs_loaded
    items = torch.arange(B)
    batch = {"actions": uniform(B, Tp, config.action_dim), "state": uniform(B, n, config.state_dim),
             "action_mask": torch.arange(Tp) < (Tp - 3 * items % Tp)[:, None]}
    embedded = get("encoders") == "none"
    L = max(1, get("text_len"))
    written = torch.arange(L) < (L - items % L)[:, None]
    if config.n_cameras and not embedded:
        shape = (B, n, config.n_cameras, 3, *config.image_size)
        batch["images"] = torch.randint(256, shape, generator=g, dtype=torch.uint8)
    if get("text_dim"):
        batch["text_embedding"] = uniform(B, config.text_dim)
    elif get("text_len") and not embedded:
        batch["text"] = torch.randint(1, 257, (B, config.text_len), generator=g) * written
    if embedded:
        N = config.n_obs_steps * config.cameras * config.tokens_per_image
        batch["image_embeds"] = uniform(B, N, config.vit_width)
        batch["background_embeds"] = uniform(B, config.tokens_per_image, config.vit_width)
        batch["lang_embeds"], batch["lang_mask"] = uniform(B, L, config.t5_width), written
        batch["empty_embeds"] = uniform(B, 1, config.t5_width)
    if hasattr(config, "unified_dim"):
        batch["control_hz"] = 10.0 + 5 * items
        if not config.action_names:
            for kind in ("action", "state"):
                batch[f"{kind}_valid"] = (uniform(B, config.unified_dim) > 0).float()
    return {key: value.to(device) for key, value in batch.items()}


def noise_shape(config):
    if hasattr(config, "data_shape"):
        return getattr(config, "latent_shape", config.data_shape)
    width = getattr(config, "unified_dim", 0) or getattr(config, "padded_dim", 0) or config.action_dim
    if getattr(config, "conditioning", "") == "inpaint":
        width += config.state_dim + config.n_cameras * 2 * config.n_keypoints
    return config.pred_horizon, width


def make_draws(config, B, seed=1):
    """noise and t for `loss`: n_draws B of each, all items once, then again."""
    g = torch.Generator().manual_seed(seed)
    n = B * getattr(config, "n_draws", 1)
    K = getattr(config, "n_diffusion_steps", 0)
    t = torch.randint(K, (n,), generator=g) if K else 0.1 + 0.8 * torch.rand(n, generator=g)
    return {"noise": torch.randn(n, *noise_shape(config), generator=g), "t": t}


def make_noise(config, B, seed=2):
    """What `sample` draws: its start and, where the steps are noisy, the noise of each but the last."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(B, *noise_shape(config), generator=g)
    noise = {"noise": draw()}
    if getattr(config, "sampler", "") == "ddpm":
        noise["step_noise"] = [draw() for _ in range(config.sampler_steps - 1)]
    return noise


def observed(batch):
    """The batch of a robot, or of someone who asks for pictures."""
    seen = {k: v for k, v in batch.items() if k not in ("actions", "action_mask", "x")}
    return seen or {"n": len(batch["x"])}


def rows(batch, i):
    take = lambda v: [x[i] for x in v] if isinstance(v, list) else v[i]
    return {k: take(v) for k, v in batch.items()}


# ---------------------------------------------------------------- nothing waits for the device
class Waits(TorchDispatchMode):
    """Lists in `found` where the host would wait for a GPU, with the meta device in its place: values read
    back, copies from the host. What is read back is made up, so that one run finds all of them. `wide`: where
    float64 is on the device, which some (MPS) do not have."""

    def __init__(self):
        super().__init__()
        self.found, self.wide, self.calls = [], [], Calls(self)

    def __enter__(self):
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.calls.__exit__(*exception)

    def note(self, kind):
        self.found.append(f"{kind}: {self.place()}")

    def place(self):
        """The innermost line of a model file that is being executed."""
        frame = sys._getframe(1)
        while frame and Path(frame.f_code.co_filename) not in [ROOT / f"{name}.py" for name in FILES]:
            frame = frame.f_back
        if frame is None:
            return "outside of the model files"
        path, line = frame.f_code.co_filename, frame.f_lineno
        return f"{Path(path).name}:{line}: {linecache.getline(path, line).strip()}"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        op = func.overloadpacket
        x = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if x is not None and x.is_meta:
            if op is aten._local_scalar_dense:
                self.note("value read")
                return x.dtype == torch.bool or (1.0 if x.is_floating_point() else 1)
            if op in (aten._unique2, aten.unique_dim):
                self.note("value read")
                return torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
            if op is aten._to_copy and str(kwargs.get("device", "meta")) != "meta":
                self.note("value read")
                return torch.zeros(x.shape, dtype=kwargs.get("dtype") or x.dtype)
            if op is aten.copy_ and not args[1].is_meta:
                self.note("copy from the host")
            if op is aten.index and any(i is not None and not i.is_meta for i in args[1]):
                self.note("copy from the host")
        elif x is not None and op is aten._to_copy and str(kwargs.get("device")) == "meta":
            self.note("copy from the host")
        out = func(*args, **kwargs)
        y = out if isinstance(out, torch.Tensor) else x
        if y is not None and y.dtype == torch.float64 and y.is_meta:
            self.wide.append(self.place())
        return out


class Calls(TorchFunctionMode):
    """The two that no dispatch mode sees: torch.tensor(numbers, device=...) and x[list]."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        makes = func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
        if makes and out.is_meta and not isinstance(args[-1], torch.Tensor):
            self.waits.note("copy from the host")
        if func is torch.Tensor.__getitem__ and args[0].is_meta:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, list) for i in index):
                self.waits.note("copy from the host")
        return out


@functools.lru_cache(maxsize=2)
def on_meta(name, preset):
    """A preset's model at its full width, without memory. Of layers, which are all alike, there are two (dit:
    one)."""
    module = load(name)
    config = module.Config(**module.PRESETS[preset])
    most = 1 if name == "dit" else 2
    layers = ("depth", "vit_depth", "t5_depth", "vae_res_blocks")
    deep = [key for key in layers if getattr(config, key, 0) > most]
    config = dataclasses.replace(config, **dict.fromkeys(deep, most))
    if getattr(config, "obs", "") == "image" and not config.n_cameras:  # train.py fills these in
        config = dataclasses.replace(config, n_cameras=2, state_dim=3)
    with torch.device("meta"):
        model = module.Model(config)
    # A model that is built on the CPU and moved leaves behind what is neither parameter nor buffer.
    for part in model.modules():
        for key, value in list(vars(part).items()):
            if isinstance(value, torch.Tensor):
                some = torch.linspace(0.9, 0.1, value.numel(), dtype=value.dtype).view(value.shape)
                setattr(part, key, some)
    if name == "dit":  # the autoencoder of the released sizes is loaded, that of "tiny" is trained already
        model.set_extra_state(torch.tensor(config.vae_steps + 1))
    return model


def presets():
    for name in FILES:
        try:
            names = list(load(name).PRESETS)
        except Exception:                       # the tests themselves will say what is wrong with this file
            names = ["tiny"]
        yield from (pytest.param(name, preset, id=f"{name}-{preset}") for preset in names)


# They draw or embed a time in float64 where the device has it.
WIDE = ("rdt", "pi0", "pi05")
each_preset = pytest.mark.parametrize("name, preset", list(presets()))


@each_preset
def test_training_does_not_wait_for_the_device(name, preset):
    model = on_meta(name, preset).train()
    batch = make_batch(model.config, 2, device="meta")
    with Waits():
        model.loss(batch)["loss"].backward()    # tables that are kept come to the device here
    with Waits() as waits:
        model.loss(batch)["loss"].backward()
    assert not waits.found, "\n".join(["", *waits.found])
    assert name in WIDE or not waits.wide, "\n".join(["float64", *waits.wide])


@each_preset
def test_sampling_waits_once_at_most(name, preset):
    model = on_meta(name, preset).eval()
    if getattr(model.config, "solver", "") == "dopri5":  # it reads its error to choose the next step
        model.config = dataclasses.replace(model.config, solver="midpoint")
    batch = observed(make_batch(model.config, 2, device="meta"))
    steps = 2
    with Waits():
        model.sample(batch, steps=steps)        # tables that are kept come to the device here
    with Waits() as waits:
        model.sample(batch, steps=steps)
    assert len(waits.found) <= 1, "\n".join(["", *waits.found])
    assert name in WIDE or not waits.wide, "\n".join(["float64", *waits.wide])


def test_dit_training_its_autoencoder_does_not_wait_for_the_device():
    model = on_meta("dit", "tiny").train()
    model.set_extra_state(torch.tensor(0))
    batch = make_batch(model.config, 2, device="meta")
    model.loss(batch)["loss"].backward()
    with Waits() as waits:
        model.loss(batch)["loss"].backward()
    assert "nll" in model.loss(batch) and not waits.found, "\n".join(["", *waits.found])


@each_file
def test_a_whole_training_step_does_not_wait_for_the_device(name):
    model = on_meta(name, "tiny").train()
    average = [torch.empty_like(p) for p in model.parameters()]
    batch = make_batch(model.config, 2, device="meta")
    optimizer = torch.optim.AdamW(model.param_groups(1e-3), lr=1e-3)

    def step():
        model.loss(batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(model.parameters()), 0.01)

    step()
    with Waits() as waits:
        step()
    assert not waits.found, "\n".join(["", *waits.found])


def test_the_list_of_waits_is_complete():
    """Each way to wait is seen by `Waits`, and what does not wait is not."""
    x, index = torch.zeros(4, 3, device="meta"), torch.arange(4)
    waiting = [lambda: x.sum().item(), lambda: bool((x > 0).all()), lambda: x.tolist(), lambda: x.unique(),
               lambda: x[[0, 1]], lambda: x[index], lambda: index.to("meta"), lambda: x.cpu(),
               lambda: torch.tensor([1.0], device="meta"), lambda: x.new_tensor([1.0]),
               lambda: x[0].copy_(index[:3])]
    free = [lambda: x[0], lambda: x[:, 1:].sum(), lambda: torch.where(x > 0, 0.0, 1.0),
            lambda: x * torch.tensor(2.0), lambda: x[x.new_zeros(2, dtype=torch.long)],
            lambda: torch.full((2,), 3.0, device="meta")]
    for call in waiting + free:
        with Waits() as waits:
            call()
        assert len(waits.found) == (call in waiting), waits.found
    with pytest.raises(Exception), Waits():
        x + index[:, None]                      # a tensor that was left on the CPU


# ---------------------------------------------------------------- bfloat16
def close(a, b, share, what):
    """a equals b but for `share` of b's deviation, root mean square."""
    assert a.dtype == torch.float32 and a.isfinite().all(), what
    error = (a - b).square().mean().sqrt() / b.std()
    assert error < share, f"{what} is off by {error:.3f} of its deviation"


@each_case
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16(case, how):
    model = make_model(case).eval()
    batch, draws, noise = (make(model.config, 4) for make in (make_batch, make_draws, make_noise))
    exact, sample = model.loss(batch, **draws), model.sample(observed(batch), **noise)
    exact["loss"].backward()
    trained = {key for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model = model.to(torch.bfloat16) if how == "weights" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        half, half_sample = model.loss(batch, **draws), model.sample(observed(batch), **noise)
    half["loss"].backward()
    assert half["loss"].dtype == half["per_sample"].dtype == torch.float32
    if not (case == "dit-latents" and half["loss"].isfinite()):  # its z0 is a new draw in each call
        assert abs(half["loss"] / exact["loss"] - 1) < 0.05
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == trained and all(g.isfinite().all() for g in grads.values())
    close(half_sample, sample, 0.15, "the sample")


# ---------------------------------------------------------------- fields of Config
SWEPT = ("ddpm-points", "ddpm-images", "flow_matching-points", "flow_matching-images", "dp_cnn-images",
         "dp_transformer-images", "dit-latents", "dit_policy-images", "rdt-images", "pi0-images",
         "pi05-images")
# Probabilities and other parts of a whole.
SHARES = ("label_dropout", "dropout", "embed_dropout", "state_dropout", "token_dropout", "mask_prob", "eta",
          "text_share")
INTEGERS, FLOATS = (0, -1, 1, 2, 3, 5, 33), (0.0, -1.0, 0.5, 1.0, 7.0, math.nan, math.inf, -math.inf)


def values(now):
    """Values of the field's own type, sensible and not. (What has another type is refused by the loader.)"""
    if isinstance(now, bool):
        return [True, False]
    if isinstance(now, int):
        return [*INTEGERS, 10**9]
    if isinstance(now, float):
        return list(FLOATS)
    if isinstance(now, str):
        return ["", "no such thing"]
    texts = any(isinstance(x, str) for x in now)
    bad = [("no such thing",), tuple(now[:1]) * 2] if texts else [
        (0,), (-1,), (1,), (3,), *(now[:i] + (v,) + now[i + 1:] for i in range(len(now)) for v in (0, -1, 7))]
    return list(dict.fromkeys([(), *bad]))


def fault(case, field, value):
    """None if Config(field=value) is refused in one line or works, else what went wrong. No number may be
    nan, none that counts something may be negative."""
    module = load(case.split("-")[0])
    try:
        config = module.Config(**CASES[case] | {field: value})
        if value == 10**9:                      # what it would build does not fit into memory
            return None
        numbers = [x for x in (value if isinstance(value, tuple) else (value,)) if not isinstance(x, str)]
        if field in SHARES and not 0 <= value <= 1 or any(
                math.isnan(x) or x < 0 and isinstance(x, int) for x in numbers):
            return "is accepted"
        model, batch = module.Model(config), make_batch(config, 2)
        if hasattr(config, "encode_text") and "text" in batch:
            batch["text"] = config.encode_text("ab").expand(2, -1)
        loss = model.loss(batch)["loss"]
        assert loss.shape == ()
    except ValueError as e:
        one_line = "\n" not in str(e) and 0 < len(str(e)) <= 400
        return None if one_line else f"a message of {len(str(e))} characters"
    except Exception as e:
        return f"{type(e).__name__}: {' '.join(str(e).split())[:110]}"


@each_file
@pytest.mark.filterwarnings("ignore")
def test_no_value_of_a_field_ends_in_a_traceback(name):
    torch.manual_seed(0)
    faults = []
    for case in (case for case in SWEPT if case.split("-")[0] == name):
        for field, now in vars(make_config(case)).items():
            for value in values(now):
                wrong = fault(case, field, value)
                if wrong:
                    faults.append(f"{case} {field} = {value!r}: {wrong}")
    assert not faults, "\n".join([f"{len(faults)} values", *faults])


@each_file
def test_a_chain_of_one_level(name):
    """K = 1, or 2 where one is refused in a line: nothing is divided by K - 1 = 0."""
    case = FIRST[name]
    if not hasattr(make_config(case), "n_diffusion_steps"):
        pytest.skip("a flow has no levels")
    try:
        model = make_model(case, n_diffusion_steps=1, sampler_steps=1).eval()
    except ValueError:
        model = make_model(case, n_diffusion_steps=2, sampler_steps=1).eval()
    batch = make_batch(model.config, 3)
    losses = model.loss(batch)
    assert all(value.isfinite().all() for value in losses.values())
    assert ((losses["t"] >= 0) & (losses["t"] <= 1)).all()
    assert model.sample(observed(batch)).isfinite().all()
    if hasattr(model, "bits_per_dim"):
        assert model.bits_per_dim(batch)["total"].abs().max() < 1e4


# ---------------------------------------------------------------- a batch is its items
@each_case
def test_the_loss_of_a_batch_is_that_of_its_items(case):
    if case == "dit-latents":
        pytest.skip("a latent is a draw from q(z | x), of which `loss` takes no noise")
    model, B = make_model(case).eval(), 3
    batch, draws = make_batch(model.config, B), make_draws(model.config, B)
    with torch.no_grad():
        losses = model.loss(batch, **draws)
        for i in range(B):
            own = [i + B * k for k in range(len(draws["t"]) // B)]
            alone = model.loss(rows(batch, slice(i, i + 1)), **rows(draws, own))["per_sample"]
            torch.testing.assert_close(losses["per_sample"][own], alone, rtol=1e-3, atol=1e-5)
    flow = losses.get("flow", losses["loss"])
    steps = batch["action_mask"].sum(1) if "action_mask" in batch else torch.ones(B)
    steps = steps.repeat(len(draws["t"]) // B)
    torch.testing.assert_close(flow, (losses["per_sample"] * steps).sum() / steps.sum(), rtol=1e-4, atol=1e-6)


@each_case
def test_the_samples_of_a_batch_are_those_of_its_items(case):
    model, B = make_model(case).eval(), 3
    batch, noise = observed(make_batch(model.config, B)), make_noise(model.config, B)
    together = model.sample(batch, **noise)
    assert len(together.flatten(1).unique(dim=0)) == B
    for i in range(B):
        one = slice(i, i + 1)
        alone = model.sample(rows(batch, one), **rows(noise, one))
        torch.testing.assert_close(together[one], alone, rtol=1e-3, atol=1e-3)


@each_case
def test_every_input_counts_for_its_own_item(case):
    """Exchanging an input of items 1 and 2 changes these two samples and leaves item 0 alone."""
    model, B = make_model(case).eval(), 3
    batch, noise = observed(make_batch(model.config, B)), make_noise(model.config, B)
    before = model.sample(batch, **noise)
    for key in batch:
        after = model.sample(batch | {key: batch[key][[0, 2, 1]]}, **noise)
        torch.testing.assert_close(after[0], before[0], rtol=1e-3, atol=1e-3)
        unread = {"background_embeds", "empty_embeds"}          # stand for what is hidden, and nothing is
        unread |= {"state"} if case.startswith("pi05") else set()   # which reads it in the text
        counts = key not in unread
        assert all(((after[i] - before[i]).abs().max() > 1e-6) == counts for i in (1, 2)), key
    places = itertools.product(*map(range, batch["images"].shape[1:3])) if "images" in batch else []
    for step, camera in places:
        images = batch["images"].clone()
        images[:, step, camera] = 255 - images[:, step, camera]
        after = model.sample(batch | {"images": images}, **noise)
        seen = all((after[i] - before[i]).abs().max() > 1e-6 for i in range(B))
        assert seen == (step < model.config.n_obs_steps), f"step {step}, camera {camera}"


# ---------------------------------------------------------------- pictures
PICTURES = [f"{name}-images" for name in POLICIES]
# What a number of 0..255 becomes in each channel: (value - mean) / deviation.
SCALES = {"dit_policy": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))}
SYMMETRIC = ((127.5,) * 3, (127.5,) * 3)


def scaled(name, images):
    mean, deviation = (torch.tensor(x)[:, None, None] for x in SCALES.get(name, SYMMETRIC))
    return (images.float() - mean) / deviation


def first_convolution(model):
    return next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3)


@pytest.mark.parametrize("case", PICTURES)
def test_pictures_reach_the_encoder_scaled(case):
    """Black, white and one colour of each channel, by literal numbers."""
    name, seen = case.split("-")[0], []
    changes = {"crop_size": ()} if hasattr(make_config(case), "crop_size") else {}
    model = make_model(case, image_size=(32, 32), **changes).eval()
    first_convolution(model).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for colour in [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 51)]:
        batch = make_batch(model.config, 1)
        batch["images"][:] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
        seen.clear()
        model.sample(observed(batch))
        want = scaled(name, torch.tensor(colour)[:, None, None])
        torch.testing.assert_close(seen[0], want.expand_as(seen[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", PICTURES)
def test_pictures_of_bytes_and_of_floats_are_the_same(case):
    """Floats are taken as scaled already; by rdt, pi0 and pi05 as fitted to the encoder's square, too."""
    name = case.split("-")[0]
    changes = {"image_size": (16, 16)} if name in ("rdt", "pi0", "pi05") else {}
    model = make_model(case, **changes).eval()
    batch, draws = make_batch(model.config, 3), make_draws(model.config, 3)
    images = batch["images"]
    floats, wrong = batch | {"images": scaled(name, images)}, batch | {"images": images.float() / 255 + 1}
    with torch.no_grad():
        exact, same, other = (model.loss(b, **draws)["per_sample"] for b in (batch, floats, wrong))
    torch.testing.assert_close(same, exact, rtol=1e-4, atol=1e-6)
    assert (other - exact).abs().max() > 1e-5


# ---------------------------------------------------------------- randomness
@each_case
def test_the_generator_decides_every_draw_of_a_sample(case):
    model = make_model(case).eval()
    batch = observed(make_batch(model.config, 2))
    draw = lambda seed: model.sample(batch, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    torch.manual_seed(2)
    assert torch.equal(draw(0), first) and not torch.equal(draw(1), first)


@each_case
def test_without_a_generator_the_seed_decides(case):
    model = make_model(case).train()
    batch = make_batch(model.config, 2)

    def run(seed):
        torch.manual_seed(seed)
        if case.startswith("dit-"):
            model.set_extra_state(torch.tensor(model.config.vae_steps + 1))
        return model.loss(batch)["per_sample"], model.sample(observed(batch))

    (loss, sample), (same_loss, same_sample), (other_loss, other_sample) = run(0), run(0), run(1)
    assert torch.equal(loss, same_loss) and torch.equal(sample, same_sample)
    assert not torch.equal(loss, other_loss) and not torch.equal(sample, other_sample)


@each_case
def test_what_is_given_is_not_drawn(case):
    model = make_model(case).eval()
    batch, draws, noise = (make(model.config, 2) for make in (make_batch, make_draws, make_noise))
    state = torch.get_rng_state()
    if case != "dit-latents":                   # its z0 is drawn
        model.loss(batch, **draws)
        assert torch.equal(torch.get_rng_state(), state), "loss"
    model.sample(observed(batch), **noise)
    assert torch.equal(torch.get_rng_state(), state), "sample"


@each_case
def test_every_draw_has_a_time_and_a_noise_of_its_own(case):
    model = make_model(case).eval()
    if case == "dit-latents":
        pytest.skip("as the others of dit, with one draw more")
    B = 6
    batch = {k: v[:1].expand(B, *v.shape[1:]) for k, v in make_batch(model.config, 1).items()}
    torch.manual_seed(0)
    t = model.loss(batch)["t"]
    assert len(t) == B * getattr(model.config, "n_draws", 1) and len(t.unique()) > len(t) / 3
    draws = make_draws(model.config, B)
    fixed_t = model.loss(batch, t=draws["t"][:1].expand_as(draws["t"]))["per_sample"]
    assert len(fixed_t.unique()) == len(t)      # one time, but a noise for each


# ---------------------------------------------------------------- training mode
# Without label dropout there is no guidance.
GUIDED = {case: {"guidance": 1.0} for case in CASES if case.startswith(("ddpm", "flow", "dit-"))}


def random_parts():
    """Each field of each case that makes training random, how it is switched on, and all others off."""
    for case in (case for case in CASES if case != "dit-latents"):
        config = make_config(case)
        off = {f.name: type(getattr(config, f.name))() for f in dataclasses.fields(config)
               if re.search("dropout|flip", f.name) or f.name in ("crop_size", "mask_prob", "state_noise")}
        points = len(getattr(config, "data_shape", "CHW")) == 1
        for field, none in off.items():
            on = getattr(config, field) if field == "crop_size" else True if none is False else 0.5
            if on and not (points and re.search("^dropout|flip", field)):
                yield pytest.param(case, field, off | {field: on}, id=f"{case}-{field}")


@pytest.mark.parametrize("case, field, changes", list(random_parts()))
def test_training_is_random_and_evaluation_is_not(case, field, changes):
    model = make_model(case, **changes | ({} if changes.get("label_dropout", 1) else GUIDED.get(case, {})))
    batch, draws = make_batch(model.config, 8), make_draws(model.config, 8)
    loss = lambda model: model.loss(batch, **draws)["per_sample"].detach()
    torch.manual_seed(0)
    model.eval()
    assert torch.equal(loss(model), loss(model))
    model.train()
    assert not torch.equal(loss(model), loss(model))


# ---------------------------------------------------------------- weight decay
def decayed(name, model):
    """Which trainable parameters decay, by what their modules are."""
    everything = {key for key, p in model.named_parameters() if p.requires_grad}
    if name in ("dp_cnn", "dit_policy", "rdt", "pi0", "pi05"):
        return everything
    kernels = (nn.Linear,) if name == "dp_transformer" else (nn.Linear, nn.Conv2d)
    matrices = {f"{key}.weight" for key, m in model.named_modules() if isinstance(m, kernels)}
    inside = "transformer." if name == "dp_transformer" else ""
    return {key for key in matrices & everything if key.startswith(inside)}


@each_case
def test_weight_decay_acts_on_what_it_should(case):
    name, model = case.split("-")[0], make_model(case)
    groups = model.param_groups(0.1)
    names = {id(p): key for key, p in model.named_parameters()}
    grouped = [names[id(p)] for group in groups for p in group["params"]]
    trainable = [key for key, p in model.named_parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable), "every parameter once"
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    encoders = {key for key in decay if name == "dp_transformer" and key.startswith("encoders.")}
    assert {decay[key] for key in encoders} <= {getattr(model.config, "obs_encoder_weight_decay", None)}
    assert {key for key in decay if decay[key] == 0.1} == decayed(name, model)
    assert {decay[key] for key in set(decay) - decayed(name, model) - encoders} <= {0.0}


# ---------------------------------------------------------------- steps past the end of an episode
def alpha_bar(K):
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    factors = [1 - min(1 - f((i + 1) / K) / f(i / K), 0.999) for i in range(K)]
    return torch.tensor(list(itertools.accumulate(factors, lambda a, b: a * b)))


@pytest.mark.parametrize("case", [c for c in CASES if c.split("-")[0] in POLICIES and c != "rdt-images"
                                  and c != "rdt-embeddings"])
@pytest.mark.parametrize("trains", [False, True])
def test_steps_past_the_end_count_if_asked_for(case, trains):
    """What is to be predicted there is changed, and what the network sees, x_t, is not: noise gives way."""
    if not hasattr(make_config(case), "train_on_padding"):
        pytest.skip("this file has no field train_on_padding yet")
    model = make_model(case, train_on_padding=trains).eval()
    config, B = model.config, 3
    batch, draws = make_batch(config, B), make_draws(config, B)
    n = len(draws["t"]) // B
    if case.startswith("pi0"):
        signal, sigma = 1 - draws["t"], draws["t"]
    else:
        draws["t"] = 5 + draws["t"] % 10
        signal, sigma = alpha_bar(20)[draws["t"]].sqrt(), (1 - alpha_bar(20)[draws["t"]]).sqrt()
    change = torch.randn(batch["actions"].shape) * ~batch["action_mask"][..., None]
    other = batch | {"actions": batch["actions"] + change}
    A = change.shape[-1]
    moved = draws["noise"].clone()
    moved[..., :A] -= (signal / sigma)[:, None, None] * change.repeat(n, 1, 1)
    with torch.no_grad():
        before = model.loss(batch, **draws)
        after = model.loss(other, **draws | {"noise": moved})
        full = model.loss(batch | {"action_mask": torch.ones_like(batch["action_mask"])}, **draws)
    same = torch.isclose(before["per_sample"], after["per_sample"], rtol=1e-3, atol=1e-5)
    ragged = (~batch["action_mask"]).any(1).repeat(n)
    assert same[~ragged].all() and (same[ragged] == (not trains)).all()
    for key in ("loss", "per_sample"):
        assert torch.allclose(before[key], full[key], rtol=1e-5) == trains, key


# ---------------------------------------------------------------- memory
class Memory(TorchDispatchMode):
    """How many bytes live tensors held at the last operation, as far as operations made them."""

    def __init__(self):
        super().__init__()
        self.owners, self.size, self.now, self.last = {}, {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.hold(x)
        self.last = self.now
        return out

    def hold(self, x):
        storage = x.untyped_storage()
        key = storage.data_ptr()
        if key not in self.owners:
            self.owners[key], self.size[key] = 0, storage.nbytes()
            self.now += storage.nbytes()
        self.owners[key] += 1
        weakref.finalize(x, self.release, key)

    def release(self, key):
        self.owners[key] -= 1
        if not self.owners[key]:
            del self.owners[key]
            self.now -= self.size.pop(key)


def kept(model, B, steps):
    """Bytes that `sample` still holds at its end."""
    batch = make_batch(model.config, 1)
    batch = observed({k: v.expand(B, *v.shape[1:]) for k, v in batch.items()})
    model.sample(batch, steps=steps)            # tables that are kept
    with Memory() as memory:
        model.sample(batch, steps=steps)
    return memory.last


@each_case
def test_sampling_keeps_nothing_of_past_steps(case, monkeypatch):
    """More steps may need more memory, for tables, but none that grows with the batch."""
    if case.startswith("dit_policy"):
        pytest.skip("its modulation of all steps is computed before the loop (difference 6)")
    model = make_model(case, n_diffusion_steps=50) if "n_diffusion_steps" in CASES[case] else make_model(case)
    model.eval()
    # dit computes ahead of its loop for as many steps as this allows.
    monkeypatch.setattr(load(case.split("-")[0]), "MODULATION_LIMIT", 1, raising=False)
    grown = {B: kept(model, B, 11) - kept(model, B, 3) for B in (2, 18)}
    state = 4 * math.prod(noise_shape(model.config))
    per_item = (grown[18] - grown[2]) / 16
    assert per_item < 2 * state, f"8 more steps take {per_item:.0f} bytes an item, x_t is {state}"


# ---------------------------------------------------------------- tables that are kept
@each_case
def test_tables_made_while_sampling_serve_training(case):
    """An lru_cache that is filled in inference mode, or on the meta device, must not poison what follows."""
    module = load(case.split("-")[0])
    for cached in vars(module).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
    model = make_model(case)
    if case.startswith("dit-"):
        model.set_extra_state(torch.tensor(model.config.vae_steps + 1))
    batch = make_batch(model.config, 2)
    with torch.device("meta"):
        module.Model(model.config)
    with torch.inference_mode():
        model.eval().loss(batch), model.sample(observed(batch))
    loss = model.train().loss(batch)["loss"]
    loss.backward()
    assert loss.isfinite()


@each_case
def test_tables_are_neither_saved_nor_rounded(case):
    """They follow from the Config: no entry of a checkpoint, and .to(bfloat16) leaves them alone."""
    model = make_model(case)
    tables = [key for key, value in model.named_buffers() if value.is_floating_point() and "mask" not in key]
    saved = [key for key in model.state_dict() if re.search(r"alpha_bar|table|level", key)]
    assert not tables and not saved


# ---------------------------------------------------------------- the text of the files
@each_file
def test_functions_fit_on_a_screen_or_two(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    long = [f"{node.name}: {node.end_lineno - node.lineno + 1} lines" for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 80]
    assert not long, long


@each_file
def test_section_heads_have_one_form(name):
    heads = [line for line in (ROOT / f"{name}.py").read_text().splitlines() if re.match(r"# -{8}", line)]
    odd = [line for line in heads if not re.fullmatch(r"# -{64} \S.*", line)]
    assert heads and not odd, "\n".join(["", *odd])


# What a thing was called in some file -> its name in all.
OLD_NAMES = {"check_name": "check_choice", "step_embedding": "time_embedding", "Step": "Coefficients",
             "pick": "at"}


@each_file
def test_one_thing_has_one_name(name):
    module = load(name)
    old = {was: now for was, now in OLD_NAMES.items() if was in vars(module)}
    assert not old, old
    if name not in ("pi0", "pi05"):             # they offer no choice
        assert callable(vars(module).get("check_choice"))
    if name != "flow_matching":                 # it has no released weights
        assert callable(vars(module).get("load_strictly"))


def test_what_has_one_name_in_two_files_is_the_same_or_says_how_it_differs():
    versions = {}                               # {name: {text: (files, docstring)}}
    for name in FILES:
        text = (ROOT / f"{name}.py").read_text()
        for node in ast.parse(text).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name not in ("Config", "main"):
                part = ast.get_source_segment(text, node)
                texts = versions.setdefault(node.name, {})
                texts.setdefault(part, ([], ast.get_docstring(node) or ""))[0].append(name)
    silent = {part: [" ".join(files) for files, docstring in found.values() if "differ" not in docstring]
              for part, found in versions.items()}
    silent = [f"{part}: {' | '.join(files)}" for part, files in silent.items() if len(files) > 1]
    assert not silent, "\n".join(["", *silent])


@each_file
def test_comments_explain_every_field(name):
    """At the end of the field's line or on the lines above."""
    text = (ROOT / f"{name}.py").read_text()
    comments = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(text).readline)
                if t.type == tokenize.COMMENT and not t.string.startswith("# --")}
    config = next(n for n in ast.parse(text).body if getattr(n, "name", "") == "Config")
    bare = [n.target.id for n in config.body if isinstance(n, ast.AnnAssign)
            and not {n.lineno - 1, n.lineno, n.end_lineno} & comments]
    assert not bare, bare
