"""What nodes of a torch.fx graph hold, with exact types; those of torch.fx are unions."""

from torch import fx


def module_name(node: fx.Node) -> str:
    """The module that a ``call_module`` node calls."""
    return str(node.target)


def source_of(node: fx.Node, number: int = 0) -> fx.Node:
    """The node whose output is argument ``number`` of ``node``."""
    argument = node.args[number]
    assert isinstance(argument, fx.Node)
    return argument
