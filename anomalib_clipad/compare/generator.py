"""From a configuration to the jobs of a comparison."""

from collections import Counter
from collections.abc import Iterator, Sequence

from anomalib.pipelines.components import Job, JobGenerator

from anomalib_clipad.compare.job import CompareJob, category_of
from anomalib_clipad.compare.settings import Config, Settings, grid_words, short_class, spell_out
from anomalib_clipad.compare.shots import variants
from anomalib_clipad.data.datamodules import build_datamodule, categories_on_disk
from anomalib_clipad.errors import InputError


class CompareJobGenerator(JobGenerator):
    """Makes a job of every model on every category.

    Args:
        accelerator: ``cpu`` or ``cuda``.

    Example:
        >>> grid = {"class_path": "ClipAdSdp", "init_args": {"rvs": {"grid": ["mean", "kde"]}}}
        >>> jobs = CompareJobGenerator("cpu").generate_jobs({"models": [grid, "WinClip"], "images": "photos"})
        >>> [job.model_name for job in jobs]
        ['ClipAdSdp rvs=mean', 'ClipAdSdp rvs=kde', 'WinClip']
    """

    def __init__(self, accelerator: str) -> None:
        self.accelerator = accelerator

    @property
    def job_class(self) -> type[Job]:
        """Kind of the jobs."""
        return CompareJob

    def generate_jobs(  # type: ignore[override]  # a list instead of an iterator, so that a bar knows its length
        self, args: dict | None = None, prev_stage_result: object = None
    ) -> Sequence[CompareJob]:
        """All jobs of a configuration, category by category.

        Raises:
            InputError: If a key or a value cannot be used, or two models or two data sets have one name.
        """
        del prev_stage_result
        settings = Settings.read(args or {})
        models = _named_models(settings.models)
        jobs = [
            CompareJob(
                config,
                one,
                settings.images,
                seed,
                settings.map_size,
                settings.output,
                self.accelerator,
                settings.metrics,
                shots,
                model["name"],
            )
            for one in _named_data(settings.data)
            for model in models
            for config, shots, seed in variants(model, settings.shots, settings.seed)
        ]
        if not jobs:
            msg = f"No model can be tried with shots {list(settings.shots or ())}; add a number above 0."
            raise InputError(msg)
        first = [job for job in jobs if (job.model_name, job.seed) == (jobs[0].model_name, jobs[0].seed)]
        if twice := _repeated([job.category for job in first]):
            msg = f"Several data sets are called {', '.join(twice)}; give each entry of data a name of its own."
            raise InputError(msg)
        return jobs


def _named_models(entries: list[Config]) -> list[Config]:
    """Models without grids, each with a name of its own."""
    found = []
    for entry in entries:
        for config, chosen in spell_out(entry):
            name = entry.get("name") or short_class(config["class_path"])
            words = grid_words(chosen, leave_out=() if "name" in entry else ("class_path",))
            found.append({**config, "name": f"{name} {words}".strip()})
    if twice := _repeated([config["name"] for config in found]):
        msg = f"Several models are called {', '.join(twice)}; give each entry of models a name of its own."
        raise InputError(msg)
    return found


def _named_data(entries: list[Config] | None) -> Iterator[Config | None]:
    """Data sets without grids, those of one name told apart by class or by what was chosen from a grid."""
    if entries is None:
        yield None
        return
    found = [one for entry in entries for one in spell_out(_categories(entry))]
    names = [category_of(config, None) for config, _ in found]
    for (config, chosen), name in zip(found, names, strict=True):
        if names.count(name) == 1:
            yield config
            continue
        words = grid_words(chosen, leave_out=("init_args.category",))
        kinds = {other["class_path"] for (other, _), same in zip(found, names, strict=True) if same == name}
        kind = short_class(config["class_path"]) if len(kinds) > 1 else ""
        yield {**config, "name": " ".join(filter(None, (kind, name, words)))}


def _categories(config: Config) -> Config:
    """``category: all`` as a grid of what is on disk."""
    arguments = dict(config.get("init_args", {}))
    if arguments.get("category") != "all":
        return config
    arguments.pop("category")
    try:
        names = categories_on_disk(build_datamodule({"class_path": config["class_path"], "init_args": arguments}))
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        msg = f"{config['class_path']} cannot be built from its init_args ({error}); mend the configuration."
        raise InputError(msg) from error
    if not names:
        msg = f"No category of {config['class_path']} is on disk under {arguments.get('root', 'its root')}."
        raise InputError(msg)
    return {**config, "init_args": {**arguments, "category": {"grid": names}}}


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)
