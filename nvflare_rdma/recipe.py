"""Calls that add this package's parts to a FLARE recipe or job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.flare_compat import apps_of, job_of, prepare_client_apps, use_installed_package

_SERVER = "server"
_ALL_SITES = "@ALL"


def add_quantization(
    target: Any,
    quantization_type: str = "float16",
    tasks: Sequence[str] | None = None,
    policy: Sequence[Any] = (),
    error_feedback: bool = False,
    delta: bool = False,
    stochastic_rounding: bool = False,
) -> None:
    """Send models in few bits both ways: add the four filters that this takes to a recipe or job.

    Server and clients each get a `ModelQuantizer` for what they send and a `ModelDequantizer` for what they
    receive. Call it once, after the recipe has been made.

    Args:
        target: a FLARE `Recipe`, or a `FedJob`; in a FedJob with client apps per site, every site gets the filters.
        quantization_type: see `nvflare_rdma.filters.ModelQuantizer`.
        tasks: names of the tasks whose models are quantized; None means `["train"]`, the task of FLARE's FedAvg.
            FLARE matches filters to tasks by name, so `"*"` would match nothing and is refused.
        policy: rules that say which codec each tensor gets, before the default ones (norms, biases and tensors of
            less than 1024 elements travel exact). See `nvflare_rdma.codecs.policy`.
        error_feedback, delta, stochastic_rounding: see `nvflare_rdma.filters.ModelQuantizer`.

    Raises:
        ConfigError: an unknown type or rule, a bad task list, a target that is neither recipe nor job, or one that has
            quantization filters already. Nothing has been added then.
    """
    names = ["train"] if tasks is None else tasks
    if isinstance(names, str) or not names or any(not isinstance(t, str) or t in ("", "*") for t in names):
        raise ConfigError(f"tasks must be a list of task names such as ['train'], but is {tasks!r}")

    job = _checked_job(target, "quantization", "add_quantization")
    from nvflare.job_config.defs import FilterType

    from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer

    out = ModelQuantizer(
        quantization_type,
        policy=policy,
        error_feedback=error_feedback,
        delta=delta,
        stochastic_rounding=stochastic_rounding,
    )
    into = ModelDequantizer()
    apps = apps_of(target, "add_quantization")
    for site, app in apps.items():
        for section in ("task_data_filters", "task_result_filters"):
            present = {type(each).__name__ for _, filters in getattr(app.app_config, section) for each in filters}
            for name in ("ModelQuantizer", "ModelDequantizer"):
                advice = "add quantization once, or use other filters by hand"
                _refuse_second_use(name in present, f"{name} in {section} of '{site}'", advice)
    use_installed_package(job)

    names = list(names)
    if job is not target:  # a recipe adds filters to all of its sites by itself
        target.add_server_output_filter(out, tasks=names)
        target.add_server_input_filter(into, tasks=names)
        target.add_client_input_filter(into, tasks=names)
        target.add_client_output_filter(out, tasks=names)
        return
    job.to_server(out, filter_type=FilterType.TASK_DATA, tasks=names)
    job.to_server(into, filter_type=FilterType.TASK_RESULT, tasks=names)
    for site in _client_sites(apps):
        job.to(into, site, filter_type=FilterType.TASK_DATA, tasks=names)
        job.to(out, site, filter_type=FilterType.TASK_RESULT, tasks=names)


def add_transfer(target: Any) -> None:
    """Move tensors and arrays directly between the processes that hold and want them: add `RdmaTransfer` to the server
    and to every site of a recipe or job. Call it once, after the recipe has been made and configured per site.

    Args:
        target: a FLARE `Recipe`, or a `FedJob`; in a FedJob with client apps per site, every site gets the component.

    Raises:
        ConfigError: a target that is neither recipe nor job, or one that has the component already. Nothing has been
            added then.
    """
    job = _checked_job(target, "a transfer", "add_transfer")
    from nvflare_rdma.streaming import RdmaTransfer

    prepare_client_apps(target, "add_transfer")  # each site's own, if it has been given any
    apps = apps_of(target, "add_transfer")
    for site, app in apps.items():
        present = any(isinstance(component, RdmaTransfer) for component in app.app_config.components.values())
        _refuse_second_use(present, f"RdmaTransfer for '{site}'", "add it once")
    use_installed_package(job)

    job.to_server(RdmaTransfer(), id="rdma_transfer")
    for site in _client_sites(apps):
        job.to(RdmaTransfer(), site, id="rdma_transfer")


def _checked_job(target: Any, what: str, feature: str) -> Any:
    """The job of a recipe or job to which `what` is to be added, or ConfigError."""
    from nvflare.job_config.api import FedJob
    from nvflare.recipe.spec import Recipe

    if not isinstance(target, Recipe | FedJob):
        raise ConfigError(f"{what} can be added to a FLARE Recipe or FedJob, but not to {type(target).__name__}")
    return job_of(target, feature)


def _refuse_second_use(present: bool, what: str, advice: str) -> None:
    if present:
        raise ConfigError(f"the job already has {what}: {advice}")


def _client_sites(apps: Mapping[str, Any]) -> list[str]:
    """The sites that have client apps of their own, or the name that stands for all sites."""
    return [site for site in apps if site not in (_SERVER, _ALL_SITES)] or [_ALL_SITES]
