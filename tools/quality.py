"""How good a model is apart from the closed loop: losses and errors on held-out data, distances of samples.
"""
import torch
import torch.nn.functional as F


COMPARED = ("actions", "state", "action_mask", "action_valid")      # what action_errors reads of a batch


@torch.no_grad()
def validate(model, items, normalizer, seed, n=256):
    """Loss, loss per tenth of t, and mean absolute error of sampled actions over the executed steps, in
    data units; on held-out episodes, always the same items, noise and t. Pictures come 32 at a time, tokens
    of pictures, of which the largest models take thousands, 8: 256 at once take 241 GiB in rdt's 1B."""
    if not len(items):
        return {}
    chosen = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[:n]
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    generator, losses, chunks, batches = torch.Generator().manual_seed(seed), [], [], []
    has = items.batch(chosen[:1])
    for part in chosen.split(8 if "image_embeds" in has else 32 if "images" in has else n):
        batch = {k: v.to(device) for k, v in items.batch(part).items()}
        losses += [model.loss(batch) for _ in range(4)]
        if normalizer is not None:
            chunks.append(model.sample(batch, generator=generator).float())
            batches.append({key: batch[key] for key in COMPARED if key in batch})
    t = torch.cat([x["t"] for x in losses]).cpu()
    per_sample = torch.cat([x["per_sample"] for x in losses]).float().cpu()
    bucket = (t * 10).long().clamp(max=9)
    loss_t = [per_sample[bucket == b].mean().item() if (bucket == b).any() else None for b in range(10)]
    row = {"val_loss": per_sample.mean().item(), "loss_t": loss_t}
    if normalizer is not None:
        batch = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        row |= action_errors(model.config, torch.cat(chunks), batch, normalizer, items.demos)
    return row


def action_errors(config, sampled, batch, normalizer, demos):
    """Mean absolute errors over the executed steps, in data units: of the sampled chunks (B, Tp, A), and of
    what knows nothing: the mean action (of relative actions: the mean way from here), and, where states are
    what actions are, to stay."""
    now, batch = batch["state"][:, config.n_obs_steps - 1].cpu(), {k: x.cpu() for k, x in batch.items()}
    mean = normalizer.normalize("actions", normalizer.stats["actions"]["mean"]).expand_as(batch["actions"])
    raw = demos.processing.raw(normalizer, torch.stack([sampled.cpu(), batch["actions"], mean]), now)
    executed = slice(-config.first_action, -config.first_action + config.n_action_steps)
    real = batch["action_mask"][:, executed, None].expand_as(raw[0, :, executed]).clone()
    if "action_valid" in batch:
        real &= batch["action_valid"][:, None]
    error = lambda guess: (guess - raw[1])[:, executed][real].abs().mean().item()
    row = {"action_error": error(raw[0]), "error_of_mean": error(raw[2])}
    names = getattr(config, "action_names", ())
    pose = normalizer.unnormalize("state", now)
    if list(demos.state_keys) == ["qpos"]:                                  # as ALOHA has it
        pose = demos.processing.undo_state(pose)["qpos"]
    elif not names or names != config.state_names:
        return row
    if pose.shape[-1] == raw.shape[-1]:
        row["error_of_staying"] = error(pose[:, None].expand_as(raw[1]))
    return row


def energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two samples (N, ...): 0 only if their distributions are equal."""
    x, y = x.flatten(1), y.flatten(1)
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()


def compare_samples(model, held_out, seed, train=None):
    """Energy distance of samples to held-out data, and of two halves of the data as its floor: {"distance",
    "floor"}; for images with classes also how often a classifier, trained on `train`, finds the class that
    was asked for in the samples, and in held-out images. At most 1000 points or 128 images each."""
    n = min(len(held_out) // 2, 1000 if len(held_out.shape) == 1 else 128)
    if not n:
        return {}
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed))
    halves = [held_out.batch(order[i * n:(i + 1) * n]) for i in (0, 1)]
    device = next(model.parameters()).device
    asked = {k: v.to(device) for k, v in halves[0].items()}
    samples = model.sample(asked, generator=torch.Generator().manual_seed(seed)).float().cpu()
    result = {"distance": energy_distance(samples, halves[1]["x"]),
              "floor": energy_distance(halves[0]["x"], halves[1]["x"])}
    if train is not None and len(train.shape) == 3 and model.config.n_classes and "label" in halves[0]:
        classify = classifier(train, seed)
        right = lambda x, label: (classify(x) == label).float().mean().item()
        every = held_out.batch(order[:1000])
        result |= {"accuracy_samples": right(samples, halves[0]["label"]),
                   "accuracy_real": right(every["x"], every["label"])}
    return result


def classifier(train, seed, steps=400):
    """A small convolutional network that names the class of images, trained on the real ones: function images
    (B, C, H, W) in [-1, 1] -> labels (B,). On one core: seconds."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        widths = (train.shape[0], 16, 32, 64)
        layers = [layer for a, b in zip(widths, widths[1:]) for layer in
                  (torch.nn.Conv2d(a, b, 3, stride=2, padding=1), torch.nn.BatchNorm2d(b), torch.nn.ReLU())]
        net = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.LazyLinear(train.n_classes))
        net(train.batch(torch.arange(2))["x"].cpu())                # LazyLinear learns its width
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(steps):
            batch = train.batch(torch.randint(len(train), (64,)))
            F.cross_entropy(net(batch["x"].cpu()), batch["label"].cpu()).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    net.eval().requires_grad_(False)
    return lambda images: net(images.cpu()).argmax(1)
