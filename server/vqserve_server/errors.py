"""The errors of `vqserve.errors`, which were here, also by their former names; until the next release."""

from typing import TYPE_CHECKING

from vqserve.errors import *  # noqa: F403
from vqserve.errors import CodebookNotFound, DeadlineExceeded, InvalidArgument
from vqserve.renamed import renamed

if TYPE_CHECKING:
    InvalidRequest = InvalidArgument
    UnknownCodebook = CodebookNotFound
    DeadlineExpired = DeadlineExceeded
else:
    __getattr__ = renamed(
        __name__,
        InvalidRequest=InvalidArgument,
        UnknownCodebook=CodebookNotFound,
        DeadlineExpired=DeadlineExceeded,
    )
