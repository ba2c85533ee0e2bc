"""Calls that add this package's parts to a FLARE recipe or job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from nvflare.apis.job_def import ALL_SITES, SERVER_SITE_NAME

from nvflare_rdma import class_list
from nvflare_rdma.errors import ConfigError
from nvflare_rdma.flare_compat import apps_of, job_of, prepare_client_apps, use_installed_package
from nvflare_rdma.logs import get_logger
from nvflare_rdma.settings import parse_patience
from nvflare_rdma.timers import lengthen
from nvflare_rdma.workflows import check_tasks, sends_tasks, sites_with_peers

log = get_logger(__name__)


def add_quantization(  # noqa: PLR0913 - one call for what is one filter's arguments, and where it goes
    target: Any,
    quantization_type: str = "float16",
    tasks: Sequence[str] | None = None,
    policy: Sequence[Any] = (),
    error_feedback: bool = False,
    delta: bool | None = None,
    stochastic_rounding: bool = False,
    clients: Sequence[str] | None = None,
    max_relative_error: float | None = None,
    round_seconds: float | None = None,
    round_bytes: int | None = None,
) -> None:
    """Send models in few bits both ways: add the four filters that this takes to a recipe or job.

    Server and clients each get a `ModelQuantizer` for what they send and a `ModelDequantizer` for what they
    receive. Call it once, after the recipe has been made and configured per site.

    In a workflow that the sites control (`SwarmLearningRecipe`, FLARE's `CCWFJob`), models go from site to site, and
    FLARE applies no filters to them. Each site gets a `PeerQuantizer` there, which works together with `add_transfer`.

    Args:
        target: a FLARE `Recipe`, or a `FedJob`; in a FedJob with client apps per site, every site gets the filters.
        quantization_type: see `nvflare_rdma.filters.ModelQuantizer`.
        tasks: names of the tasks whose models are quantized; None means `["train"]`, the task of FLARE's FedAvg.
            FLARE matches filters to tasks by name, so `"*"` would match nothing and is refused. They mean nothing
            where the sites control all workflows.
        policy: rules that say which codec each tensor gets, before the default ones (norms, biases and tensors of
            less than 1024 elements travel exact). See `nvflare_rdma.codecs.policy`.
        error_feedback, delta, stochastic_rounding: see `nvflare_rdma.filters.ModelQuantizer`. What a type can't do
            without is on with it: `delta` with `exact_delta`, `delta` and `error_feedback` with `topk2`. With
            `error_feedback` so is `delta`, unless it is False.
        clients: the sites that get it, None for all. To and from the others models travel in full, and they need not
            have this package. It takes a job with an app for each site (`Recipe.set_per_site_config`).
        max_relative_error: how much of a tensor may be lost, such as 0.05; what would lose more travels in a better
            type. See `nvflare_rdma.filters.ModelQuantizer`.
        round_seconds: with quantization_type `auto`, how long a round's traffic at a site may take, down and up
            together. Each site gets, and sends, the best type that its link allows. It takes `add_transfer`, which
            measures that.
        round_bytes: with quantization_type `auto`, how many bytes a round's traffic at a site may have, down and up
            together; in place of `round_seconds`, or besides it.

    Raises:
        ConfigError: an unknown type or rule, a bad list of tasks or clients, a bad largest error, a target that is
            neither recipe nor job, one that has quantization filters already, or one in which nothing would be
            quantized. Nothing has been added then.
    """
    names = ["train"] if tasks is None else tasks
    if isinstance(names, str) or not names or any(not isinstance(t, str) or t in ("", "*") for t in names):
        raise ConfigError(f"tasks must be a list of task names such as ['train'], but is {tasks!r}")
    names = list(names)

    job = _checked_job(target, "quantization", "add_quantization")
    from nvflare.job_config.defs import FilterType

    from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer, PeerQuantizer, with_needed

    rules, only = list(policy), None if clients is None else list(clients)
    given = {"error_feedback": error_feedback, "delta": delta, "stochastic_rounding": stochastic_rounding}
    options = with_needed(quantization_type, rules, given)

    def quantizer(**more: Any) -> ModelQuantizer:
        limits: dict[str, Any] = {
            "max_relative_error": max_relative_error,
            "round_seconds": round_seconds,
            "round_bytes": round_bytes,
        }
        return ModelQuantizer(quantization_type, policy=rules, **limits, **options, **more)

    from_server, from_client = quantizer(clients=only), quantizer()
    prepare_client_apps(target, "add_quantization")
    apps = apps_of(target, "add_quantization")
    _refuse_quantization_twice(apps)
    sites = _client_sites(apps, clients)
    if problem := check_tasks(apps, sites, names):
        # The sites of a recipe have all their executors, and somebody who names tasks knows them.
        if tasks is not None or target is not job:
            raise ConfigError(problem)
        log.warning("%s, unless the job gets an executor for it later", problem)
    peers = sites_with_peers(apps, sites)
    if peers:
        _refuse_between_sites(given)
        between_sites = [(site, PeerQuantizer(quantization_type, rules, max_relative_error)) for site in peers]
        for site, component in between_sites:
            job.to(component, site, id="peer_quantizer")
    concerned = set(peers)
    if sends_tasks(apps):
        concerned = {SERVER_SITE_NAME, *sites}
        job.to_server(from_server, filter_type=FilterType.TASK_DATA, tasks=names)
        job.to_server(ModelDequantizer(clients=only), filter_type=FilterType.TASK_RESULT, tasks=names)
        for site in sites:
            job.to(ModelDequantizer(), site, filter_type=FilterType.TASK_DATA, tasks=names)
            job.to(from_client, site, filter_type=FilterType.TASK_RESULT, tasks=names)
    use_installed_package(job)
    _say_what_to_allow(apps, concerned, job, class_list.FILTERS)


def add_transfer(
    target: Any,
    clients: Sequence[str] | None = None,
    accumulate: bool = True,
    patience: str | float | None = None,
) -> None:
    """Move tensors and arrays directly between the processes that hold and want them: add `RdmaTransfer` to the server
    and to every site of a recipe or job. Call it once, after the recipe has been made and configured per site.

    Args:
        target: a FLARE `Recipe`, or a `FedJob`; in a FedJob with client apps per site, every site gets the component.
        clients: the sites that get it, None for all. The others take FLARE's own path and need not have this package.
            It takes a job with an app for each site (`Recipe.set_per_site_config`).
        accumulate: keep results that come in few bits encoded at the server until its aggregator adds them; see
            `nvflare_rdma.streaming.RdmaTransfer`.
        patience: how long a site may be out of reach in the middle of a transfer: seconds, or a text such as "4h" (1 s
            to 24 h). Transfers wait so long for it, and those of FLARE's timers that a job can set are lengthened by
            as much: see docs/outages.md. None leaves FLARE's timers alone, and the sites' `rdma_patience` counts.

    Raises:
        ConfigError: a target that is neither recipe nor job, one that has the component already, a bad list of
            clients, or a patience that is no time. Nothing has been added then.
    """
    seconds = None if patience is None else parse_patience(patience, "patience")
    job = _checked_job(target, "a transfer", "add_transfer")
    from nvflare_rdma.streaming import RdmaTransfer

    prepare_client_apps(target, "add_transfer")  # each site's own, if it has been given any
    apps = apps_of(target, "add_transfer")
    sites = _client_sites(apps, clients)
    for site, app in apps.items():
        present = any(isinstance(component, RdmaTransfer) for component in app.app_config.components.values())
        _refuse_second_use(present, f"RdmaTransfer for '{site}'", "add it once")

    use_installed_package(job)
    job.to_server(RdmaTransfer(accumulate, seconds), id="rdma_transfer")
    for site in sites:
        job.to(RdmaTransfer(patience=seconds), site, id="rdma_transfer")
    if seconds is not None:
        apps = apps_of(target, "add_transfer")
        lengthen({site: apps[site] for site in (SERVER_SITE_NAME, *sites)}, seconds)
    _say_what_to_allow(apps, {SERVER_SITE_NAME, *sites}, job, class_list.STREAMING)


def save_in_background(target: Any, persistor_id: str = "persistor") -> None:
    """Have each round begin while the checkpoint of the last one goes to disk: add `BackgroundSave` to the server of a
    recipe or job whose model FLARE's PyTorch persistor saves. Call it once, after the recipe has been made.

    Args:
        target: a FLARE `Recipe`, or a `FedJob`.
        persistor_id: the id of the persistor in the job; FLARE's recipes call it "persistor".

    Raises:
        ConfigError: a target that is neither recipe nor job, one that has no such persistor, one whose persistor has a
            `save_model_file` of its own, or that has the component already. Nothing has been added then.
    """
    job = _checked_job(target, "a save in the background", "save_in_background")
    from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor

    from nvflare_rdma.persistors import BackgroundSave

    apps = apps_of(target, "save_in_background")
    components = apps[SERVER_SITE_NAME].app_config.components if SERVER_SITE_NAME in apps else {}
    if not isinstance(found := components.get(persistor_id), PTFileModelPersistor):
        raise ConfigError(
            f"the job has {type(found).__name__ if found else 'nothing'} as {persistor_id!r}, and not FLARE's "
            "PTFileModelPersistor: give the persistor's id as persistor_id, or leave save_in_background out"
        )
    BackgroundSave.require_flares_save(found, persistor_id)
    present = any(isinstance(component, BackgroundSave) for component in components.values())
    _refuse_second_use(present, "BackgroundSave", "add it once")
    use_installed_package(job)
    job.to_server(BackgroundSave(persistor_id), id="background_save")
    _say_what_to_allow(apps, {SERVER_SITE_NAME}, job, class_list.PERSISTORS)


def _checked_job(target: Any, what: str, feature: str) -> Any:
    """The job of a recipe or job to which `what` is to be added, or ConfigError."""
    from nvflare.job_config.api import FedJob
    from nvflare.recipe.spec import Recipe

    if not isinstance(target, Recipe | FedJob):
        raise ConfigError(f"{what} can be added to a FLARE Recipe or FedJob, but not to {type(target).__name__}")
    return job_of(target, feature)


def _refuse_quantization_twice(apps: Mapping[str, Any]) -> None:
    advice = "add quantization once, or use other filters by hand"
    for site, app in apps.items():
        for section in ("task_data_filters", "task_result_filters"):
            present = {type(each).__name__ for _, filters in getattr(app.app_config, section) for each in filters}
            for name in ("ModelQuantizer", "ModelDequantizer"):
                _refuse_second_use(name in present, f"{name} in {section} of '{site}'", advice)
        components = {type(each).__name__ for each in app.app_config.components.values()}
        _refuse_second_use("PeerQuantizer" in components, f"PeerQuantizer for '{site}'", advice)


def _refuse_second_use(present: bool, what: str, advice: str) -> None:
    if present:
        raise ConfigError(f"the job already has {what}: {advice}")


def _refuse_between_sites(options: Mapping[str, Any]) -> None:
    if used := [name for name, value in options.items() if value]:
        raise ConfigError(
            f"{', '.join(used)} can't be used in a workflow that the sites control: models go from site to site there, "
            "encoded as they are sent, and nothing is known of earlier ones; leave it out"
        )


def _client_sites(apps: Mapping[str, Any], clients: Sequence[str] | None = None) -> list[str]:
    """The sites that are to get something: the name that stands for all of them if they have one app together, or else
    those that have client apps of their own; only those in `clients`, unless that is None.

    Raises:
        ConfigError: `clients` has no names, names that the job doesn't know, or the job has one app for all sites.
    """
    sites = [site for site in apps if site not in (SERVER_SITE_NAME, ALL_SITES)]
    if clients is None:
        return sites if sites and ALL_SITES not in apps else [ALL_SITES]  # beside one for all, FLARE ignores others
    if isinstance(clients, str) or not clients or any(not isinstance(name, str) for name in clients):
        raise ConfigError(f"clients must be a list of site names such as ['site-1'], but is {clients!r}")
    if ALL_SITES in apps or not sites:
        raise ConfigError(
            f"clients={list(clients)!r} takes an app for each site, but this job has one for all of them: call "
            'recipe.set_per_site_config({"site-1": {}, ...}) right after the recipe has been made, or put the parts '
            "of a FedJob to each site by name (job.to)"
        )
    if unknown := [name for name in clients if name not in sites]:
        raise ConfigError(f"clients={list(clients)!r}: the job has no {', '.join(unknown)}, only {', '.join(sites)}")
    return list(dict.fromkeys(clients))


def _say_what_to_allow(apps: Mapping[str, Any], concerned: Set[str], job: Any, entry: str) -> None:
    """Say of the sites that got something, `concerned`, which of them have to allow it in a list of FLARE's."""
    sites = [site for site in class_list.sites_without_code(apps, job.job.app_packages) if site in concerned]
    if sites:
        where = "every site and the server" if ALL_SITES in sites else ", ".join(sites)
        log.warning(
            "the job '%s' brings no code of its own so far for %s, so FLARE refuses classes there that are not in the "
            "list %s of local/resources.json (or resources.json.default). Add %s to it; `nvflare-rdma doctor "
            "--kit SITE` shows what is missing, and RdmaSimEnv adds it in its own workspace",
            job.name,
            where,
            class_list.KEY,
            class_list.line([entry]),
        )
