"""What a recipe will do, without data and weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kd_hf.distillation.summary import shown_size

if TYPE_CHECKING:
    from kd_hf.distillation.assembly import Assembly
    from kd_hf.distillation.choices import Choice
    from kd_hf.methods.base import Method
    from kd_hf.recipe.config import Recipe
    from kd_hf.tasks.base import Task


# training images of data sets that recipes name, so that steps are known without opening them
_KNOWN_SIZES = {"ILSVRC/imagenet-1k": 1_281_167, "uoft-cs/cifar100": 50_000, "builtin:digits": 1_078}


def plan_recipe(recipe: Recipe, processes: int = 1) -> dict[str, Any]:
    """Facts about a run, as plain values; :func:`describe` turns them into text.

    Args:
        recipe: the run.
        processes: number of processes it will be launched with.
    """
    from kd_hf.distillation.assembly import assemble
    from kd_hf.distillation.choices import check_methods
    from kd_hf.distillation.cost import memory_bytes, step_cost
    from kd_hf.distillation.module import check_batch
    from kd_hf.recipe.resolved import recipe_hash
    from kd_hf.recipe.variants import with_untrained_teachers

    described = with_untrained_teachers(recipe)
    num_classes = _num_classes(recipe)
    parts = assemble(described, num_classes=num_classes, device="meta")
    train = recipe.train
    check_batch(parts.choices, train.per_device_train_batch_size, processes)
    batch = train.per_device_train_batch_size * processes * train.gradient_accumulation_steps
    stores = {name: cfg.store for name, cfg in recipe.all_teachers().items() if cfg.store}
    check_methods(parts.choices, dict.fromkeys(stores))
    cost = step_cost(parts)
    images = _KNOWN_SIZES.get(recipe.data.path)
    run = replace(cost, flops={name: 0 if name in stores else flops for name, flops in cost.flops.items()})
    held = replace(parts, teachers={name: net for name, net in parts.teachers.items() if name not in stores})
    return {
        "recipe_hash": recipe_hash(recipe),
        "cell": recipe.cell,
        "published": recipe.published.model_dump() if recipe.published else None,
        "published_plain": recipe.baseline if isinstance(recipe.baseline, float) else None,
        "networks": {name: _network(parts, name) | {"macs_per_image": cost.flops[name] // 2} for name in parts.views()},
        "classes_assumed": num_classes is None,
        "methods": {choice.name: _method(parts, choice) for choice in parts.choices},
        "trained_parameters": sum(p.numel() for p in parts.module.parameters() if p.requires_grad),
        "global_batch": batch,
        "processes": processes,
        "optim": train.optim,
        "learning_rate": train.learning_rate,
        "length": _length(recipe, batch),
        "cost_over_plain_training": round(run.relative, 2),
        "memory_per_process_gib": {
            name: round(size / 2**30, 2) for name, size in memory_bytes(held, run, train, images or 0).items()
        },
        "augmentation": parts.task.drawn(parts.needs_strong),
        "order": "the image at (seed, epoch, position) is a pure function: the same on any number of processes "
        "and workers, and after a resume",
        "gates": {name: _gate(parts.task, name) for name in recipe.all_teachers() if name not in stores},
        "stores": stores,
        "batch_coupled": [choice.name for choice in parts.choices if choice.needs.batch_coupled],
        "gathered": [choice.name for choice in parts.choices if choice.needs.gathered],
        "warnings": _warnings(parts),
    }


def _length(recipe: Recipe, batch: int) -> str:
    """Steps and epochs, as far as they are known without opening data."""
    train, images = recipe.train, _KNOWN_SIZES.get(recipe.data.path)
    if images is None or recipe.data.num_labels:
        return f"{train.max_steps} steps" if train.max_steps else f"{train.num_train_epochs:g} epochs"
    every = max(1, images // batch)
    steps = train.max_steps or round(train.num_train_epochs * every)
    return f"{steps:,} steps, {every:,} an epoch, {steps / every:.4g} epochs"


def _gate(task: Task, teacher: str) -> dict[str, Any]:
    """What a teacher must reach before the first step, and what the run folder says it reached."""
    from kd_hf.run.log import read_log

    metric = task.score.key
    gate = task.recipe.all_teachers()[teacher].gate
    log = read_log(Path(task.recipe.train.output_dir))
    measured = [line for line in log if line.get("gate") == teacher]
    return {
        **gate.model_dump(),
        "score": task.score.name,
        "measured": measured[-1][metric] if measured else None,
        "measured_as_fed": measured[-1][f"{metric}_as_fed"] if measured else None,
    }


def _warnings(parts: Assembly) -> list[str]:
    """What a person should look at before starting."""
    found, fixed = [], parts.task.fixed_size  # networks that take any size have named parts
    for name, handle in parts.teachers.items():
        own, fed = handle.info.native, parts.views()[name]
        if own is not None and own.image_size != fed.image_size and fixed:
            found.append(f"{name} was made for {own.image_size} px and is shown {fed.image_size} px")
        if own is not None and (own.mean, own.std) != (fed.mean, fed.std):
            found.append(f"{name} is shown images with another mean and std than its own")
    for name, handle in (("student", parts.student), *parts.teachers.items()):
        if not handle.info.stages and not handle.info.blocks and fixed:
            found.append(f"{name}: {handle.info.name} is of a family without named stages or blocks")
    banks = {name: method.cost().sample_bytes for name, method in parts.module.named_methods()}
    if parts.recipe.data.path not in _KNOWN_SIZES:
        found += [
            f"{name} keeps {size:,} bytes of every training image, which are not counted here: no data is read"
            for name, size in banks.items()
            if size
        ]
    if len(parts.choices) == 1 and parts.teachers:
        found.append("no method reads the teacher")
    return found


def _num_classes(recipe: Recipe) -> int | None:
    """Classes of the student's head without opening data: as written, else the teacher's own."""
    return recipe.student.num_classes or next(
        (cfg.num_classes for cfg in recipe.all_teachers().values() if cfg.num_classes), None
    )


def _network(parts: Assembly, name: str) -> dict[str, Any]:
    handle = parts.student if name == "student" else parts.teachers[name]
    view = parts.views()[name]
    return {
        "model": handle.info.name,
        "library": handle.info.library,
        "parameters": handle.info.parameters,
        "classes": handle.info.num_classes,
        **parts.task.size_of(view),
        "mean": list(view.mean),
        "std": list(view.std),
        "taps": {tap: list(shape) for tap, shape in parts.shapes[name].taps.items()},
    }


def _method(parts: Assembly, choice: Choice) -> dict[str, Any]:
    cost = cast("Method", parts.module.methods[choice.name]).cost()
    return {
        "weight": choice.weight if isinstance(choice.weight, float) else choice.weight.model_dump(mode="json"),
        "until": str(choice.until) if choice.until else None,
        "options": choice.config.model_dump(mode="json"),
        "teacher": choice.teacher,
        "student_taps": dict(choice.needs.student),
        "teacher_taps": dict(choice.needs.teacher),
        "parameters": cost.parameters,
        "macs_per_image": cost.macs,
        "labels": choice.needs.labels,
        "paper": f"{choice.method.paper.title}, {choice.method.paper.url}",
    }


def describe(plan: dict[str, Any]) -> str:
    """A plan as text for a person."""
    lines = [f"recipe {plan['recipe_hash']}" + (f", cell {plan['cell']}" if plan["cell"] else "")]
    if plan["published"]:
        lines.append("published  {score:g} by {source}".format(**plan["published"]))
    if plan["published_plain"] is not None:
        lines.append(f"published  {plan['published_plain']:g} for the student without a teacher")
    for name, net in plan["networks"].items():
        lines.append(
            f"{name:10} {net['model']} ({net['library']}), {net['parameters'] / 1e6:.2f} M parameters, "
            f"{net['macs_per_image'] / 1e9:.2f} G MACs, {net['classes']} classes, {shown_size(net)}"
        )
        lines += [f"{'':10}   tap {tap} {shape}" for tap, shape in net["taps"].items()]
    for name, method in plan["methods"].items():
        extra = f", {method['parameters'] / 1e6:.2f} M parameters of its own" if method["parameters"] else ""
        until = f" until {method['until']}" if method["until"] else ""
        options = ", ".join(f"{key} {value}" for key, value in method["options"].items())
        lines.append(f"loss       {name} × {method['weight']}{until}{extra}" + (f" ({options})" if options else ""))
    if plan["classes_assumed"]:
        classes = plan["networks"]["student"]["classes"]
        lines.append(f"head       {classes} classes assumed: no data is read here; training takes them from the data")
    lines += [
        f"trained    {plan['trained_parameters'] / 1e6:.2f} M parameters, {plan['optim']} at "
        f"{plan['learning_rate']:g}, {plan['length']}",
        f"batch      {plan['global_batch']} images a step over {plan['processes']} process(es)",
        f"cost       {plan['cost_over_plain_training']:.2f} times the FLOPs of training the student alone",
        f"memory     about {sum(plan['memory_per_process_gib'].values()):.1f} GiB a process: "
        + ", ".join(f"{name} {size:.2f}" for name, size in plan["memory_per_process_gib"].items()),
        f"random     {', '.join(plan['augmentation']) or 'nothing'}",
        f"order      {plan['order']}",
    ]
    lines += [_describe_gate(name, gate) for name, gate in plan["gates"].items()]
    lines += [f"stored     {name} does not run: its outputs are read from {at}" for name, at in plan["stores"].items()]
    whole = plan["gathered"]
    local = [name for name in plan["batch_coupled"] if name not in whole]
    if local:
        names = ", ".join(local)
        lines.append(f"coupled    {names}: this loss mixes the images of one process's batch, so its size matters")
    if whole:
        lines.append(f"coupled    {', '.join(whole)}: this loss mixes the images of all processes, gathered every step")
    lines += [f"warning    {text}" for text in plan["warnings"]]
    return "\n".join(lines)


def _describe_gate(name: str, gate: dict[str, Any]) -> str:
    if not gate["enabled"]:
        return f"gate       {name} is not measured before the first step"
    least, own, fed = gate["min_score"], gate["measured"], gate["measured_as_fed"]
    wanted = "better than guessing" if least is None else f"at least {least:g}"
    text = f"gate       {name} must reach {gate['score']} {wanted} on {gate['samples']} held-out images"
    if own is None:
        return text
    return f"{text}; it reached {own:.1f} ({fed:.1f} as training feeds it) when this run began"
