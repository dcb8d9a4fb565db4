"""RDT's own code: the 170M model, whose encoders have run: 1,458 image tokens and 32 of the instruction."""
import functools

import torch

import rdt
from tools.peers.work import Work, clones, imported, pair_of_chunks, pair_of_steps, randomise

URL = "https://github.com/thu-ml/RoboticsDiffusionTransformer"
FILE = "models/rdt_runner.py"
PACKAGE = ""

CAMERAS, PICTURE, TEXT = 1, 729, 32     # two steps of one camera
CONFIG = {"rdt": {"hidden_size": 1024, "depth": 14, "num_heads": 32}, "lang_adaptor": "mlp2x_gelu",
          "img_adaptor": "mlp2x_gelu", "state_adaptor": "mlp3x_gelu",
          "noise_scheduler": {"num_train_timesteps": 1000, "num_inference_timesteps": 5,
                              "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample",
                              "clip_sample": False}}


def works(folder):
    yield Work("170M: training step, batch 1", functools.partial(training, folder))
    yield Work("170M: chunk, 5 steps", functools.partial(chunk, folder))


def models(folder):
    """-> RDTRunner with random weights, ours with the same"""
    runner = imported("models.rdt_runner", folder)
    torch.manual_seed(0)
    theirs = randomise(runner.RDTRunner(
        action_dim=128, pred_horizon=64, config=CONFIG, lang_token_dim=4096, img_token_dim=1152,
        state_token_dim=128, max_lang_cond_len=1024, img_cond_len=2 * CAMERAS * PICTURE,
        dtype=torch.float32))
    # timm's RmsNorm divides by the deviation up to 1.0.3, which RDT pins, by the root mean square later.
    norm = theirs.model.final_layer.norm_final
    far = norm(5 + torch.randn(1, 1024)).abs().max()        # 5 deviations from zero: by the rms it is about 1
    deviates = far > 3 * norm.weight.abs().max()
    config = rdt.Config(**rdt.PRESETS["170M"] | {
        "n_cameras": CAMERAS, "max_cameras": CAMERAS, "mask_prob": 0.0, "state_noise": 0.0,
        "action_names": (), "state_names": (), "action_dim": 128, "state_dim": 128,
        "norm": "released" if deviates else "true"})
    return theirs, rdt.RDT.from_official(clones(theirs), config)


def batch():
    """-> ours, and theirs as keyword arguments"""
    torch.manual_seed(1)
    ours = {"state": torch.rand(1, 1, 128), "image_embeds": torch.randn(1, 2 * CAMERAS * PICTURE, 1152),
            "lang_embeds": torch.randn(1, TEXT, 4096), "control_hz": torch.full((1,), 25.0),
            "action_valid": torch.ones(1, 128), "state_valid": torch.ones(1, 128)}
    theirs = {"lang_tokens": ours["lang_embeds"], "lang_attn_mask": torch.ones(1, TEXT, dtype=torch.bool),
              "img_tokens": ours["image_embeds"], "state_tokens": ours["state"],
              "action_mask": torch.ones(1, 1, 128), "ctrl_freqs": ours["control_hz"]}
    return ours, theirs


def training(folder):
    theirs, ours = models(folder)
    our_batch, their_batch = batch()
    our_batch |= {"actions": torch.rand(1, 64, 128), "action_mask": torch.ones(1, 64, dtype=torch.bool)}

    def draws():
        """The noise and the time that compute_loss draws after this seed."""
        torch.manual_seed(2)
        return torch.randn(1, 64, 128), torch.randint(0, 1000, (1,))

    noise, t = draws()

    def their_loss():
        torch.manual_seed(2)
        return theirs.compute_loss(action_gt=our_batch["actions"], **their_batch)

    return pair_of_steps(theirs, their_loss, ours, lambda: ours.loss(our_batch, noise, t)["loss"],
                         lr=1e-4, weight_decay=1e-2)


def chunk(folder):
    theirs, ours = models(folder)
    our_batch, their_batch = batch()
    torch.manual_seed(3)
    noise = torch.randn(1, 64, 128)

    def their_chunk():
        torch.manual_seed(3)
        return theirs.eval().predict_action(**their_batch)

    return pair_of_chunks(their_chunk, ours, lambda model: model.sample(our_batch, 5, noise))
