"""Tables: many small networks that start sparse, trained at once.

`experiment` is the whole, as in tabular.ipynb, and `program` runs it; `options` has its options,
`tables` its data, `report` its tables and pictures. `batched` trains networks of one
shape as one model; `compute` decides whether they train in their sparse forms instead. `unfinished`
keeps them.
"""

from startsparse.tabular.experiment import (
    Member,
    accuracy,
    change_masks,
    connected,
    make_member,
    make_members,
    run,
)
from startsparse.tabular.options import TabularOptions

__all__ = [
    "Member",
    "TabularOptions",
    "accuracy",
    "change_masks",
    "connected",
    "make_member",
    "make_members",
    "run",
]
