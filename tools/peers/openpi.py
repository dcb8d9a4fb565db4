"""openpi's PyTorch code: pi0 in small. Gemma of width 512 and depth 6, an expert of width 256, 6 layers of
SigLIP, three cameras of 224 x 224 pixels, 48 codes.

It needs transformers 4.53.2, over which openpi's transformers_replace is copied as its README says.
"""
import functools
import types

import torch

import pi0
from tools.peers.work import Work, clones, empty, imported, pair_of_chunks, pair_of_steps

URL = "https://github.com/Physical-Intelligence/openpi"
FILE = "src/openpi/models_pytorch/pi0_pytorch.py"
PACKAGE = "openpi"

DEPTH, CODES, ACTIONS, HORIZON, TEXT = 6, 2048, 32, 50, 48
GEMMA = {"depth": DEPTH, "num_heads": 8, "num_kv_heads": 1, "head_dim": 256}
SIZES = {"gemma_2b": {"width": 512, "mlp_dim": 4096} | GEMMA,
         "gemma_300m": {"width": 256, "mlp_dim": 1024} | GEMMA}
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
SMALL = {"depth": DEPTH, "vit_depth": DEPTH, "width": 512, "mlp": 4096, "expert_width": 256,
         "expert_mlp": 1024, "vocab_size": CODES, "augment": False}


def works(folder):
    yield Work("pi0 small: chunk, 10 steps", functools.partial(chunk, folder))
    yield Work("pi0 small: training step, batch 1 (openpi computes layers again in the backward pass)",
               functools.partial(training, folder))


def sizes(variant):
    return types.SimpleNamespace(**SIZES[variant])


def shrink(module, name, **parts):
    """Let module.name(config) build a smaller model: some numbers of its config do not follow the variant.
    parts: {"": fields of the config, "vision_config": of that part of it}"""
    build = getattr(module, name)

    def build_small(config):
        for part, fields in parts.items():
            for field, value in fields.items():
                setattr(getattr(config, part) if part else config, field, value)
        return build(config)

    setattr(module, name, build_small)


def shrink_gemma(module, paligemma, gemma):
    """The classes of these names in `module`, for SMALL."""
    shrink(module, paligemma, text_config={"vocab_size": CODES}, **{"": {"_vocab_size": CODES}},
           vision_config={"num_hidden_layers": DEPTH, "projection_dim": SIZES["gemma_2b"]["width"]})
    shrink(module, gemma, **{"": {"vocab_size": CODES}})


def ours(theirs):
    torch.manual_seed(0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.02)
    weights = {key: x for key, x in clones(theirs).items() if not key.endswith("gemma_expert.lm_head.weight")}
    return pi0.Pi0.from_official(weights, pi0.Config(**pi0.PRESETS["pi0"] | SMALL))


@functools.lru_cache(1)
def network(folder):
    """The class PI0Pytorch. JAX is not needed: its Gemma is asked for sizes only, its resizing not at all."""
    source = folder / "src" if folder else None
    imported("openpi", source)
    empty("openpi.models.gemma", get_config=sizes)
    empty("openpi.shared.image_tools")
    shrink_gemma(imported("openpi.models_pytorch.gemma_pytorch", source),
                 "PaliGemmaForConditionalGeneration", "GemmaForCausalLM")
    return imported("openpi.models_pytorch.pi0_pytorch", source).PI0Pytorch


def models(folder):
    theirs = network(folder)(types.SimpleNamespace(
        pi05=False, paligemma_variant="gemma_2b", action_expert_variant="gemma_300m", dtype="float32",
        action_dim=ACTIONS, action_horizon=HORIZON, pytorch_compile_mode=None))
    return theirs, ours(theirs)


def batch():
    """Ours: three pictures in [-1, 1], a text, a state."""
    torch.manual_seed(1)
    return {"images": torch.rand(1, 1, 3, 3, 224, 224) * 2 - 1, "text": torch.randint(1, CODES, (1, TEXT)),
            "state": torch.rand(1, 1, ACTIONS), "actions": torch.rand(1, HORIZON, ACTIONS) * 2 - 1,
            "action_mask": torch.ones(1, HORIZON, dtype=torch.bool)}


def observation(batch):
    return types.SimpleNamespace(
        images={name: batch["images"][:, 0, i] for i, name in enumerate(CAMERAS)}, image_masks={},
        state=batch["state"][:, 0], tokenized_prompt=batch["text"],
        tokenized_prompt_mask=batch["text"] > 0, token_ar_mask=None, token_loss_mask=None)


def training(folder):
    theirs, ours = models(folder)
    mine, noise, t = batch(), torch.randn(1, HORIZON, ACTIONS), torch.full((1,), 0.4)
    processing = imported("openpi.models_pytorch.preprocessing_pytorch")
    prepare = processing.preprocess_observation_pytorch
    # Pictures as they are: the augmentation draws at random.
    processing.preprocess_observation_pytorch = lambda observation, train: prepare(observation, train=False)
    return pair_of_steps(theirs, lambda: theirs(observation(mine), mine["actions"], noise, t).mean(),
                         ours, lambda: ours.loss(mine, noise, t)["loss"], lr=2.5e-5, weight_decay=1e-10)


def chunk(folder):
    theirs, ours = models(folder)
    mine, noise = batch(), torch.randn(1, HORIZON, ACTIONS)
    return pair_of_chunks(lambda: theirs.eval().sample_actions("cpu", observation(mine), noise, 10), ours,
                          lambda model: model.sample(mine, 10, noise))
