"""One call that adds this package's parts to a FLARE recipe or job."""

from collections.abc import Sequence
from typing import Any

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.flare_compat import apps_of, job_of, prepare_client_apps

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
        tasks: names of the tasks whose models are quantized; None means ``["train"]``, the task of FLARE's FedAvg.
            FLARE matches filters to tasks by name, so ``"*"`` would match nothing and is refused.
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

    from nvflare.job_config.api import FedJob
    from nvflare.job_config.defs import FilterType
    from nvflare.recipe.spec import Recipe

    from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer

    if not isinstance(target, Recipe | FedJob):
        raise ConfigError(f"quantization can be added to a FLARE Recipe or FedJob, but not to {type(target).__name__}")
    out = ModelQuantizer(
        quantization_type,
        policy=policy,
        error_feedback=error_feedback,
        delta=delta,
        stochastic_rounding=stochastic_rounding,
    )
    job = job_of(target, "add_quantization")
    _refuse_second_use(job)
    # FLARE copies the sources of packages that it doesn't know into the job. This one is installed on every site, and
    # a partial copy of another version must not get in its way.
    job.set_app_packages(sorted({*job.job.app_packages, "nvflare_rdma"}))

    names = list(names)
    into = ModelDequantizer()
    if isinstance(target, Recipe):
        target.add_server_output_filter(out, tasks=names)
        target.add_server_input_filter(into, tasks=names)
        target.add_client_input_filter(into, tasks=names)
        target.add_client_output_filter(out, tasks=names)
        return
    job.to_server(out, filter_type=FilterType.TASK_DATA, tasks=names)
    job.to_server(into, filter_type=FilterType.TASK_RESULT, tasks=names)
    sites = [site for site in apps_of(job, "add_quantization") if site not in (_SERVER, _ALL_SITES)] or [_ALL_SITES]
    for site in sites:
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
    from nvflare.job_config.api import FedJob
    from nvflare.recipe.spec import Recipe

    from nvflare_rdma.streaming import RdmaTransfer

    if not isinstance(target, Recipe | FedJob):
        raise ConfigError(f"a transfer can be added to a FLARE Recipe or FedJob, but not to {type(target).__name__}")
    job = job_of(target, "add_transfer")
    prepare_client_apps(target, "add_transfer")
    apps = apps_of(target, "add_transfer")
    for site, app in apps.items():
        if any(isinstance(component, RdmaTransfer) for component in app.app_config.components.values()):
            raise ConfigError(f"the job already has RdmaTransfer for '{site}': add it once")
    job.set_app_packages(sorted({*job.job.app_packages, "nvflare_rdma"}))
    sites = [site for site in apps if site not in (_SERVER, _ALL_SITES)]
    job.to_server(RdmaTransfer(), id="rdma_transfer")
    if sites:
        for site in sites:
            job.to(RdmaTransfer(), site, id="rdma_transfer")
    else:
        job.to_clients(RdmaTransfer(), id="rdma_transfer")


def _refuse_second_use(job: Any) -> None:
    for site, app in apps_of(job, "add_quantization").items():
        for section in ("task_data_filters", "task_result_filters"):
            for _, filters in getattr(app.app_config, section):
                for present in filters:
                    if type(present).__name__ in ("ModelQuantizer", "ModelDequantizer"):
                        raise ConfigError(
                            f"the job already has {type(present).__name__} in {section} of '{site}': "
                            "add quantization once, or use other filters by hand"
                        )
