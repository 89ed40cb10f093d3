"""--data, which is the folder of the sets in two scripts and the set itself in the third."""

from pathlib import Path

from startsparse.data import SETS
from startsparse.errors import OptionError
from startsparse.fields import flag, normal, shown


def understood(kind: type, argv: list[str]) -> list[str]:
    """Flags as they are meant: --data cifar10 is the set where no folder has that name.

    Raises:
        OptionError: another set is named as well; or --data is the set and a folder is given.
    """
    own = {field: flag(shown(kind)[field]) for field in ("data", "set")}
    sets, meant, index = [normal(name) for name in SETS], [], 0
    while index < len(argv):
        word, equals, value = argv[index].partition("=")
        words = argv[index : index + (1 if equals else 2)] if word == "--data" else argv[index:][:1]
        index += len(words)
        if word == "--data":
            value = value if equals else "".join(words[1:])
            known, folder = normal(value) in sets, bool(value) and Path(value).is_dir()
            if own["set"] == "--data" and folder and not known:
                raise OptionError(f"--data: is the set; the folder of the sets is {own['data']}")
            if own["data"] == "--data" and known and not folder:
                if own["set"] in (other.partition("=")[0] for other in argv):
                    raise OptionError(
                        f"--data: is the folder of the sets, and there is no folder {value}; "
                        f"{own['set']} names the set already"
                    )
                words = [own["set"], value]
        meant += words
    return meant
