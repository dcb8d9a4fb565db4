"""Fields of a policy's Config that a set of demonstrations decides, so that they need no flags."""
import torch

from robot import tabletop
from robot.errors import UserError, few, one_line, say
from robot.processing import Processing
from robot.released_rdt import camera_places

LONGEST_TEXT = 1024             # bytes; text_len does not follow an instruction beyond that


def facts_of(demos, module, options):
    """{field of Config: value}. A field that the preset or --set gives is left alone where the data are not
    the only ones to know. Notes go to stderr."""
    fields = vars(module.Config)
    given = module.PRESETS.get(options.preset, {}) | options.set
    facts = {"action_dim": demos.action_dim, "state_dim": demos.state_dim,
             "n_cameras": len(demos.processing.places)}
    if demos.image_size:
        facts["image_size"] = tuple(demos.image_size)
    if "wrist_cameras" in fields and "wrist_cameras" not in options.set:    # by their names, as in openpi
        facts["wrist_cameras"] = tuple(v for v, (place, _) in enumerate(demos.processing.places)
                                       if "wrist" in place or "eye_in_hand" in place)
    if not demos.camera_keys and fields.get("obs") == "image" and "obs" not in given:
        facts["obs"] = "lowdim"
    facts |= text_facts(demos, module, given, "obs" in facts, options.set)
    if options.robots:          # their actions and states come packed
        facts |= {"action_names": (), "state_names": ()}
    elif hasattr(module, "UNIFIED"):
        facts |= place_names(demos, module, given)
    return facts


def place_cameras(demos, module, given):
    """Released weights of rdt know their cameras by places. They are named in processing: cameras; where they
    are not, names that leave no doubt do."""
    if not hasattr(module, "CAMERA_PLACES") or not given.get("max_cameras") or not demos.camera_keys:
        return
    cameras = demos.processing.spec.get("cameras") or {}
    if not cameras:
        for key in demos.camera_keys:
            has = lambda *words: any(word in key.lower() for word in words)
            outside = has("front", "high", "top", "head", "side", "ext", "base", "agentview")
            on_arm = has("wrist", "hand", "gripper", "left", "right") and not outside
            place = "external" if not on_arm else "left_wrist" if has("left") else "right_wrist"
            if place in cameras:
                raise UserError(f"cameras {cameras[place]!r} and {key!r} would both be {place}: name them in "
                                f"YAML, processing: cameras: {{external: KEY, right_wrist: KEY, ..}}")
            cameras[place] = key
        taken = ", ".join(f"{place}: {key}" for place, key in cameras.items())
        say(f"cameras are taken for {taken}; to say it yourself: processing: cameras: in YAML")
    spec = demos.processing.spec | {"cameras": camera_places(cameras, module)}
    demos.process(Processing(spec, demos.state_keys, demos.camera_keys))


def text_facts(demos, module, given, blind, chosen):
    """text_len grows with the longest instruction. `blind`: the policy has no pictures."""
    length = given.get("text_len", getattr(module.Config, "text_len", 0))
    if not length or "text_len" in chosen or given.get("tokenizer_path"):
        return {}
    if blind and module.__name__.endswith("dit_policy"):
        say("there is no camera: the states are taken, and no instruction is read, since dit_policy reads "
            "it with the pictures")
        return {"text_len": 0}
    longest, what = max(len(text.encode()) for text in demos.instructions), "instruction has"
    if given.get("state_in_text", getattr(module.Config, "state_in_text", False)):
        reader = module.Config(text_len=8 + 4 * demos.state_dim)
        state = reader.encode_text("", torch.zeros(demos.state_dim))
        longest, what = longest + int((state > 0).sum()), "instruction and the state have"
    if length < longest <= LONGEST_TEXT:
        say(f"text_len is {longest} instead of {length}: the longest {what} so many bytes")
        return {"text_len": longest}
    return {}


def place_names(demos, module, given):
    """Names in rdt's unified vector, where nobody gave any: those of the file if rdt knows them, else its
    first places, in the order of the file."""
    known = {place: name for name, place in module.UNIFIED.items() if name.startswith(("right_", "left_"))}
    facts = {}
    for kind, dim, said in (("action", demos.action_dim, demos.action_names),
                            ("state", demos.state_dim, demos.state_names)):
        field = f"{kind}_names"
        built_in = demos.source in tabletop.ROBOTS and dim == len(getattr(module.Config, field))
        if field in given or built_in:
            continue
        names = tuple(said)
        if len(names) != dim or len({module.UNIFIED.get(name, name) for name in names} & {*known}) != dim:
            names = tuple(known[place] for place in sorted(known)[:dim])
            say(f"{one_line(demos.source, 100)} does not name its {dim} {kind} dimensions as UNIFIED in "
                f"{module.__name__}.py does: in their order they are taken for {few(names, 2)}; to name them "
                f"yourself: --set \"{field}=[{', '.join(names[::-1][:2])}, ...]\"")
        facts[field] = names
    return facts
