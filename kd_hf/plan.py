"""Explain a recipe without training it: ``python -m kd_hf.plan RECIPE [key=value …] [--json | --schema]``.

Networks are built on the meta device: no weights, no data, no network access for architectures that are known here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from kd_hf.errors import UserError, run_command

if TYPE_CHECKING:
    from kd_hf.assemble import Assembly
    from kd_hf.config import Recipe
    from kd_hf.distill import Choice
    from kd_hf.methods.base import Method


def plan_recipe(recipe: Recipe, processes: int = 1) -> dict[str, Any]:
    """Facts about a run, as plain values; :func:`describe` turns them into text.

    Args:
        recipe: the run.
        processes: number of processes it will be launched with.
    """
    from kd_hf.assemble import assemble, with_untrained_teachers
    from kd_hf.data.mix import is_mixing
    from kd_hf.recipe import recipe_hash

    described = with_untrained_teachers(recipe)
    num_classes = _num_classes(recipe)
    parts = assemble(described, num_classes=num_classes, device="meta")
    train = recipe.train
    batch = train.per_device_train_batch_size * processes * train.gradient_accumulation_steps
    augment = recipe.data.augment
    random = [name for name in ("auto_augment", "color_jitter", "erasing") if getattr(augment, name)]
    return {
        "recipe_hash": recipe_hash(recipe),
        "networks": {name: _network(parts, name) for name in parts.views()},
        "classes_assumed": num_classes is None,
        "methods": {choice.name: _method(parts, choice) for choice in parts.choices},
        "trained_parameters": sum(p.numel() for p in parts.module.parameters() if p.requires_grad),
        "global_batch": batch,
        "processes": processes,
        "optim": train.optim,
        "learning_rate": train.learning_rate,
        "length": f"{train.max_steps} steps" if train.max_steps else f"{train.num_train_epochs:g} epochs",
        "augmentation": ["crop", "flip", *random, *(["mixing"] if is_mixing(augment) else [])],
        "order": "the image at (seed, epoch, position) is a pure function: the same on any number of processes "
        "and workers, and after a resume",
        "batch_coupled": [choice.name for choice in parts.choices if choice.needs.batch_coupled],
    }


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
        "image_size": view.image_size,
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
    lines = [f"recipe {plan['recipe_hash']}"]
    for name, net in plan["networks"].items():
        lines.append(
            f"{name:10} {net['model']} ({net['library']}), {net['parameters'] / 1e6:.2f} M parameters, "
            f"{net['classes']} classes, {net['image_size']} px"
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
        f"random     {', '.join(plan['augmentation'])}",
        f"order      {plan['order']}",
    ]
    if plan["batch_coupled"]:
        names = ", ".join(plan["batch_coupled"])
        lines.append(f"coupled    {names}: this loss mixes the images of one process's batch, so its size matters")
    return "\n".join(lines)


def announce(parts: Assembly, data: str, steps: str) -> list[str]:
    """The first lines of a run: what will be trained, on what, for how long."""
    train = parts.recipe.train
    networks = {"student": parts.student.info, **{name: handle.info for name, handle in parts.teachers.items()}}
    return [
        *(f"{name:8} {info.name} ({info.parameters / 1e6:.2f} M parameters)" for name, info in networks.items()),
        f"losses   {', '.join(choice.name for choice in parts.choices)}",
        f"data     {data}",
        f"steps    {steps}; {train.optim} at {train.learning_rate:g}",
        f"folder   {train.output_dir}",
    ]


def main(argv: Sequence[str]) -> int:
    """Parse the command line and print the plan."""
    parser = argparse.ArgumentParser(prog="python -m kd_hf.plan", description="Explain a recipe without training.")
    parser.add_argument("recipe", nargs="?", help="a recipe file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--processes", type=int, default=1, help="how many processes will be launched")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of recipe files, for editors")
    args = parser.parse_args(argv)

    from kd_hf.recipe import load_recipe, recipe_schema

    if args.schema:
        print(json.dumps(recipe_schema(), indent=1))
        return 0
    if args.recipe is None:
        raise UserError("which recipe? Give a file, e.g. recipes/quickstart.yaml, or --schema")
    if args.processes < 1:
        raise UserError(f"--processes: expected 1 or more (got {args.processes})")
    plan = plan_recipe(load_recipe(args.recipe, args.overrides), args.processes)
    print(json.dumps(plan, indent=1) if args.json else describe(plan))
    return 0


if __name__ == "__main__":
    run_command(main)
