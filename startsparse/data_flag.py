"""--data: the folder of the data sets in two scripts, the set itself in the third."""

from pathlib import Path

from startsparse.data import SETS
from startsparse.errors import OptionError
from startsparse.fields import flag, normal, shown


def understood(kind: type, argv: list[str]) -> list[str]:
    """The command line as it is meant: --data cifar10 is the set where no folder has that name.

    Raises:
        OptionError: another option names a set too; or --data is the set, and names a folder.
    """
    meant, index = [], 0
    while index < len(argv):
        word, equals, value = argv[index].partition("=")
        words = argv[index : index + (2 if word == "--data" and not equals else 1)]
        index += len(words)
        if word == "--data":
            words = _meant(kind, words, value if equals else "".join(words[1:]), argv)
        meant += words
    return meant


def _meant(kind: type, words: list[str], value: str, argv: list[str]) -> list[str]:
    """``words``, which are ``--data value``, or the flag of the set with this value."""
    flags = {field: flag(shown(kind)[field]) for field in ("data", "set")}
    known = normal(value) in map(normal, SETS)
    folder = bool(value) and Path(value).is_dir()
    if flags["set"] == "--data" and folder and not known:
        if any(normal(word.removeprefix("--data=")) in map(normal, SETS) for word in argv):
            return [flags["data"], value]  # --set or --dataset names the set
        raise OptionError(f"--data: is the set; the folder of the sets is {flags['data']}")
    if flags["data"] != "--data" or not known or folder:
        return words
    if flags["set"] in (word.partition("=")[0] for word in argv):
        raise OptionError(
            f"--data: is the folder of the sets, and there is no folder {value}; "
            f"{flags['set']} names the set already"
        )
    return [flags["set"], value]
