"""Several classes in one run: the argument ``class_name``, and which class each image is of."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePath

from anomalib_clipad.data.auxiliary import AuxiliaryDataModule
from anomalib_clipad.errors import InputError

PATTERN = "*?["  # a key with one of these is a pattern of the path, any other the name of a folder
MOST_NAMED = 3  # images in a sentence
FALLBACK_CLASS = "object"  # where neither the argument nor the data say


class Products:
    """What images may show: one class, several to choose from, or several known by their folders.

    With a mapping an image is of the class of the first pattern that its path matches, else of the innermost of its
    folders that has a class. Patterns are those of :mod:`fnmatch`, where ``*`` matches ``/``, too.

    Args:
        class_name: A name, a list of names, a mapping from folder or pattern to name, or None.

    Raises:
        InputError: If it is of another kind, empty, or names a class twice.

    Example:
        >>> Products(["bottle", "metal nut"]).names
        ('bottle', 'metal nut')
        >>> products = Products({"b": "bottle", "n": "metal nut", "*/n/turned/*": "turned nut"})
        >>> products.names
        ('bottle', 'metal nut', 'turned nut')
        >>> [products.name_of(path) for path in ("line/b/1.png", "line/n/new/2.png", "line/n/turned/3.png")]
        ['bottle', 'metal nut', 'turned nut']
    """

    def __init__(self, class_name: str | Sequence[str] | Mapping[str, str] | None) -> None:
        self.folders: dict[str, str] | None = None
        self.names: tuple[str, ...]
        if class_name is None or isinstance(class_name, str):
            self.names = (class_name,) if class_name else ()
        elif isinstance(class_name, Mapping):
            self.names, self.folders = _classes_of(class_name), dict(class_name)
        elif isinstance(class_name, Sequence):
            self.names = _classes(class_name)
        else:
            msg = f"class_name must be a name, a list of names, or a mapping from folder to name, got {class_name!r}."
            raise InputError(msg)

    @property
    def several(self) -> bool:
        """Whether images of one run may be of different classes."""
        return len(self.names) > 1

    def name_of(self, path: str) -> str | None:
        """The class of an image by its path; nothing where the mapping does not say, or there is none."""
        folders = self.folders or {}
        whole = PurePath(path)
        text = whole.as_posix()
        for key, name in folders.items():
            if _is_pattern(key) and (fnmatchcase(text, key) or fnmatchcase(text, f"*/{key}")):
                return name
        return next((folders[part] for part in reversed(whole.parts[:-1]) if part in folders), None)

    def check(self, paths: Iterable[str], class_names: Sequence[str]) -> None:
        """Refuse images that a mapping leaves out.

        Args:
            paths: The images' files.
            class_names: The network's classes.

        Raises:
            InputError: If there are any, or the network does not know a class of the mapping.
        """
        if self.folders is None:
            return
        if len(class_names) > 1 and (unknown := [name for name in self.names if name not in class_names]):
            msg = f"class_name has {unknown[0]!r}, and the checkpoint has {', '.join(class_names)}; use its classes."
            raise InputError(msg)
        left_out = [path for path in paths if self.name_of(path) is None]
        if left_out:
            more = f" and {len(left_out) - MOST_NAMED} more" if len(left_out) > MOST_NAMED else ""
            msg = (
                f"class_name has no class for {', '.join(left_out[:MOST_NAMED])}{more}; none of their folders is "
                f"{', '.join(self.folders)}. Add the folder, or a pattern of the path."
            )
            raise InputError(msg)

    def index(self, paths: Sequence[str] | None, class_names: Sequence[str]) -> list[int] | None:
        """Index of every image's class; nothing where the network is to choose, or there is one class.

        Args:
            paths: The images' files.
            class_names: The network's classes.

        Raises:
            InputError: If a mapping does not say, or says a class that the network does not know.
        """
        if self.folders is not None and not paths:
            msg = "class_name maps folders to classes, and an image without a file has no folder; give a list of names."
            raise InputError(msg)
        self.check(paths or (), class_names)
        if len(class_names) < 2 or not paths:
            return None
        if self.folders is None:
            # A checkpoint of several classes, and one of them by name: all images are of that one.
            known = len(self.names) == 1 and self.names[0] in class_names
            return [class_names.index(self.names[0])] * len(paths) if known else None
        return [class_names.index(str(self.name_of(path))) for path in paths]


def joined_classes(datamodule: object) -> tuple[str, ...]:
    """The classes that images of a data module count by, if it joins several data sets, as for training.

    Example:
        >>> joined_classes(widgets)
        ()
    """
    return tuple(datamodule.class_names) if isinstance(datamodule, AuxiliaryDataModule) else ()


def class_of(datamodule: object) -> tuple[str, ...]:
    """The class of a data module: its category, else its name; nothing where it has neither.

    One that joins several data sets, as for training, has the classes of all of them.

    Example:
        >>> class_of(widgets)
        ('widget',)
    """
    if joined := joined_classes(datamodule):
        return joined
    names = (getattr(datamodule, key, None) for key in ("category", "name"))
    return tuple(name for name in names if isinstance(name, str) and name.strip())[:1]


def _classes(names: Sequence[object]) -> tuple[str, ...]:
    if not names:
        msg = "class_name is an empty list; name what is in the images, or leave it out."
        raise InputError(msg)
    classes = tuple(map(_checked, names))
    if twice := next((name for name in classes if classes.count(name) > 1), None):
        msg = f"class_name has {twice!r} twice; name every class once."
        raise InputError(msg)
    return classes


def _classes_of(folders: Mapping[str, str]) -> tuple[str, ...]:
    if not folders:
        msg = "class_name is an empty mapping; name the folders and what is in them, or leave it out."
        raise InputError(msg)
    for key in folders:
        if not isinstance(key, str) or not key.strip() or (not _is_pattern(key) and "/" in key):
            msg = f"class_name maps names of folders, or patterns such as '*/nuts/*', to classes, got the key {key!r}."
            raise InputError(msg)
    return tuple(dict.fromkeys(map(_checked, folders.values())))


def _checked(name: object) -> str:
    if not isinstance(name, str) or not name.strip():
        found = "an empty name" if isinstance(name, str) else repr(name)
        msg = f"class_name must hold names of what is in the images, such as 'metal nut', got {found}."
        raise InputError(msg)
    return name


def _is_pattern(key: str) -> bool:
    return any(sign in key for sign in PATTERN)
