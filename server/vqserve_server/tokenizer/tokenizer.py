"""The tokenizer: what a client of a server can do, with one codebook in this process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

import numpy as np
import numpy.typing as npt

from vqserve.codebook_info import CodebookInfo
from vqserve.errors import Closed, VqserveError
from vqserve.layout import Layout, parse_layout
from vqserve.many import concerns_one_array, keyed, with_key
from vqserve.types import ArrayT, DecodeOptions, EncodeOptions, KeyT, LatentDType, LayoutName, OnError, OutputName
from vqserve.validation import check_call, check_on_error, no_codebook, wrong_digest
from vqserve_server.code_groups import CodeGroups
from vqserve_server.codebooks import Codebook, load_codebook
from vqserve_server.codebooks.kinds import KINDS
from vqserve_server.codebooks.state import CodebookState
from vqserve_server.codebooks.statistics import Statistics
from vqserve_server.device import select_device
from vqserve_server.quantizers.inference.host import HostLookup
from vqserve_server.quantizers.inference.served import Served
from vqserve_server.search import SearchCounts
from vqserve_server.tokenizer.arrays import Options, given_indices, given_latents, options, several
from vqserve_server.tokenizer.error import CodeErrors, PlainErrors
from vqserve_server.tokenizer.probe import Probe, probe

if TYPE_CHECKING:
    import torch

    from vqserve_server.quantizers import Quantizer


class Tokenizer:
    """A codebook ready to serve, with the methods of `vqserve_client.Client`: local and remote swap by one line.

    Later changes of the quantizer that it was made from have no effect. Safe for use by many threads. It pickles with
    its tables, for a process that has the same device and search backend. The options `codebook`, `digest` and
    `timeout` are a client's: the first two are held against `info`, the last has no effect.

    Attributes:
        info: description of the codebook, the same as `Client.codebooks` returns.
        decodable: the exclusive bound of the indices that decode accepts: a sentinel for unknown codes can lie beyond.
        device: where the codebook is and the search runs: a name, such as "cuda:0", which torch takes as a device.
        search: name of the search backend.
        weight_dtype: element type of the codebook, and of `decode_rows`, as numpy has it.
        probe: rows and the indices that they must have, from `check_itself` on.
        errors: measures the quantization error; None: the codes do not approximate latents.
        statistics: what the codebook's file says about other latents; None: nothing.
    """

    # Tokenizers that were pickled by earlier releases have neither.
    errors: CodeErrors | None = None
    statistics: Statistics | None = None

    def __init__(
        self,
        quantizer: Quantizer,
        *,
        name: str = "codebook",
        device: str | torch.device = "auto",
        search: str = "auto",
    ) -> None:
        """Freeze a quantizer.

        Args:
            quantizer: one of the classes that codebook files can hold, float32 or float64.
            name: what `info` calls it.
            device: "auto" (a CUDA device that works, else the CPU), "cpu", "cuda" or "cuda:i".
            search: a search backend of that device, or "auto".

        Raises:
            CodebookError: the quantizer cannot be served: half precision, NaN in a weight, a subclass, or codes that
                decode beyond float32's range.
            InvalidOption: there is no such device or search backend here.
        """
        state = CodebookState.of(quantizer)
        self._prepare(state, name, state.digest(), device=device, search=search, quantizer=quantizer)

    def _prepare(
        self,
        state: CodebookState,
        name: str,
        digest: str,
        *,
        device: str | torch.device,
        search: str,
        quantizer: Quantizer | None = None,
    ) -> None:
        """Make a codebook ready.

        Args:
            state: its arguments and arrays.
            name: what `info` calls it.
            digest: of the state.
            device: as in the constructor.
            search: as in the constructor.
            quantizer: has the state, and may change later; None: nothing changes the state.
        """
        self.device = select_device(device)
        self._served: Served | None = None
        self.errors = None
        if self.device.type == "cpu" and search in ("auto", "native"):
            self._serve_plain(state, shares_memory=quantizer is None)
        served = self._served or self._serve_any(state, search, quantizer)
        sizes = served.sizes
        self.info = CodebookInfo(
            name=name,
            digest=digest,
            kind=state.kind,
            num_codes=sizes.num_codes,
            vocab_size=sizes.vocab_size,
            input_dim=sizes.input_dim,
            code_dim=sizes.code_dim,
            output_dim=sizes.output_dim,
            num_quantizers=sizes.num_quantizers,
            stage_vocab_sizes=sizes.stage_vocab_sizes,
            layout=parse_layout(state.layout),
        )
        self.decodable = sizes.decodable
        self.search = served.search_backend
        self.weight_dtype = served.dtype
        self.probe: Probe | None = None

    def _serve_plain(self, state: CodebookState, *, shares_memory: bool) -> None:
        """Serve a plain codebook by the compiled search alone, where that can."""
        plain = state.plain(shares_memory=shares_memory)
        served = None if plain is None else HostLookup.of(plain)
        if plain is not None and served is not None:
            self._served = served
            if KINDS[state.kind].is_approximate:
                self.errors = PlainErrors(served, plain.space)

    def _serve_any(self, state: CodebookState, search: str, quantizer: Quantizer | None) -> Served:
        """Serve what needs torch: other kinds, devices and search backends."""
        import torch  # noqa: PLC0415

        from vqserve_server.quantizers.inference.base import freeze  # noqa: PLC0415
        from vqserve_server.quantizers.inference.on_device import OnDevice  # noqa: PLC0415
        from vqserve_server.tokenizer.device_errors import DeviceErrors  # noqa: PLC0415

        with torch.inference_mode(False):
            unchanging = state.build(shares_memory=True) if quantizer is None else copy.deepcopy(quantizer).cpu()
        frozen = freeze(unchanging, device=self.device, search=search, shares_memory=True)
        self._served = OnDevice(frozen)
        if unchanging.is_approximate:
            self.errors = DeviceErrors(unchanging, frozen)
        return self._served

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "auto", search: str = "auto") -> Self:
        """Load a codebook file; its stem becomes the name.

        Args:
            path: the file.
            device: as in the constructor.
            search: as in the constructor.

        Raises:
            CodebookFileError: the file is damaged, inconsistent or of an unknown version.
            InvalidOption: there is no such device or search backend here.
        """
        return cls.of_codebook(load_codebook(path), name=Path(path).stem, device=device, search=search)

    @classmethod
    def of_codebook(
        cls, codebook: Codebook, *, name: str, device: str | torch.device = "auto", search: str = "auto"
    ) -> Self:
        """Return the tokenizer of a codebook file that was just read; it uses the memory of the codebook.

        Args:
            codebook: not to be changed any more.
            name: what `info` calls it.
            device: as in the constructor.
            search: as in the constructor.

        Raises:
            CodebookError, InvalidOption: as the constructor.
        """
        made = cls.__new__(cls)
        made._prepare(codebook.state, name, codebook.digest, device=device, search=search)
        made.statistics = codebook.statistics
        return made

    @property
    def name(self) -> str:
        """The codebook's name."""
        return self.info.name

    @property
    def code_groups(self) -> CodeGroups:
        """The counters of the indices that encode gives."""
        return CodeGroups(self.info.stage_vocab_sizes or (self.decodable,) * self.info.num_quantizers)

    @property
    def digest(self) -> str:
        """Lower-case hexadecimal SHA-256 of what encode and decode read."""
        return self.info.digest

    def encode(
        self,
        latents: ArrayT,
        *,
        layout: LayoutName | Layout | None = None,
        batched: bool = True,
        num_quantizers: int | None = None,
        codebook: str | None = None,
        digest: str | None = None,
        timeout: float | None = None,
    ) -> ArrayT:
        """Return the index of the code that each latent is nearest to (or that scores highest), exactly.

        Args:
            latents: numpy float16, float32 or float64, or torch with bfloat16 too, of 2 to 5 axes with
                `info.input_dim` channels.
            layout: "channels_first" or "channels_last"; None: `info.layout`, and if that is None channels first for 4
                and 5 axes, last for 2 and 3.
            batched: False: the array has no batch axis, and the answer has none.
            num_quantizers: for a residual codebook, number of (first) indices for each token; None: all.
            codebook: the codebook's name, if it is to be checked.
            digest: the codebook's digest, or at least 8 of its first digits, if it is to be checked.
            timeout: has no effect in process, but must be valid.

        Returns:
            The same kind of array, shaped as the latents without their channel axis, or, of a residual codebook, with
            a token's indices in its place: numpy of the smallest unsigned type that holds the vocabulary, torch of
            int64 on the latents' device.

        Raises:
            NotAnArray: the latents are no numpy array or dense tensor; also a TypeError.
            InvalidDtype: the latents are no array of such a type.
            InvalidOption: `layout` is no layout, or the codebook has fewer quantizers.
            InvalidShape: the rank or the channel count is not the codebook's.
            NonFiniteLatents: names the position of a NaN or an infinity, or of a token whose projection overflows.
            CodebookNotFound: the codebook has another name.
            DigestMismatch: it has another digest.
            Closed: the tokenizer was closed.
        """
        asked = options(
            self.info, codebook, digest, timeout, layout=layout, num_quantizers=num_quantizers, batched=batched
        )
        return self._encode(latents, asked)

    def decode(
        self,
        indices: ArrayT,
        *,
        layout: LayoutName | Layout | None = None,
        batched: bool = True,
        dtype: LatentDType = "float32",
        output: OutputName = "latents",
        num_quantizers: int | None = None,
        codebook: str | None = None,
        digest: str | None = None,
        timeout: float | None = None,
    ) -> ArrayT:
        """Decode indices to latents.

        Args:
            indices: any integers, shaped as `encode` returns them, in [0, decodable), or where the stages differ in
                [0, info.stage_vocab_sizes[i]).
            layout: of the result, as in `encode`.
            batched: as in `encode`.
            dtype: of the result: "float32", "float16", "float64" or "bfloat16", or numpy's or torch's type of that
                name; rounded once from the codebook's own values. numpy has no bfloat16: float32 holds its values.
            output: "latents", which the decoder takes, or "code_rows", the codebook's rows before any projection.
            num_quantizers: for a residual codebook, number of (first) indices of each token to use; None: all.
            codebook: as in `encode`.
            digest: as in `encode`.
            timeout: has no effect in process, but must be valid.

        Returns:
            The same kind of array on the indices' device: their grid with `info.output_dim` channels, for code rows
            `info.code_dim`.

        Raises:
            IndexOutOfRange: names the position, the value and the range.
            InvalidDtype: the indices are no array of integers.
            InvalidOption: `layout`, `dtype` or `output` is not allowed, the codebook has fewer quantizers, or a value
                exceeds the range of the dtype.
            InvalidShape: the rank, or the number of indices for a token, is not the codebook's.
            NotAnArray, CodebookNotFound, DigestMismatch, Closed: as in `encode`.
        """
        asked = options(
            self.info,
            codebook,
            digest,
            timeout,
            layout=layout,
            dtype=dtype,
            output=output,
            num_quantizers=num_quantizers,
            batched=batched,
        )
        return self._decode(indices, asked)

    @overload
    def encode_many(
        self,
        items: Iterable[ArrayT],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[EncodeOptions],
    ) -> Generator[ArrayT, None, None]: ...

    @overload
    def encode_many(
        self,
        items: Iterable[tuple[KeyT, ArrayT]],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[EncodeOptions],
    ) -> Generator[tuple[KeyT, ArrayT], None, None]: ...

    @overload
    def encode_many(
        self,
        items: Iterable[ArrayT],
        *,
        on_error: Literal["return"],
        **options: Unpack[EncodeOptions],
    ) -> Generator[ArrayT | VqserveError, None, None]: ...

    @overload
    def encode_many(
        self,
        items: Iterable[tuple[KeyT, ArrayT]],
        *,
        on_error: Literal["return"],
        **options: Unpack[EncodeOptions],
    ) -> Generator[tuple[KeyT, ArrayT | VqserveError], None, None]: ...

    def encode_many(
        self,
        items: Iterable[Any],
        *,
        on_error: OnError = "raise",
        layout: LayoutName | Layout | None = None,
        batched: bool = True,
        num_quantizers: int | None = None,
        codebook: str | None = None,
        digest: str | None = None,
        timeout: float | None = None,
    ) -> Generator[Any, None, None]:
        """Return the indices of each of many arrays, lazily and in order; see `encode`."""
        asked = options(
            self.info, codebook, digest, timeout, layout=layout, num_quantizers=num_quantizers, batched=batched
        )
        check_on_error(on_error)
        return _each(several(items, "encode"), lambda array: self._encode(array, asked), on_error)

    @overload
    def decode_many(
        self,
        items: Iterable[ArrayT],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[DecodeOptions],
    ) -> Generator[ArrayT, None, None]: ...

    @overload
    def decode_many(
        self,
        items: Iterable[tuple[KeyT, ArrayT]],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[DecodeOptions],
    ) -> Generator[tuple[KeyT, ArrayT], None, None]: ...

    @overload
    def decode_many(
        self,
        items: Iterable[ArrayT],
        *,
        on_error: Literal["return"],
        **options: Unpack[DecodeOptions],
    ) -> Generator[ArrayT | VqserveError, None, None]: ...

    @overload
    def decode_many(
        self,
        items: Iterable[tuple[KeyT, ArrayT]],
        *,
        on_error: Literal["return"],
        **options: Unpack[DecodeOptions],
    ) -> Generator[tuple[KeyT, ArrayT | VqserveError], None, None]: ...

    def decode_many(
        self,
        items: Iterable[Any],
        *,
        on_error: OnError = "raise",
        layout: LayoutName | Layout | None = None,
        batched: bool = True,
        dtype: LatentDType = "float32",
        output: OutputName = "latents",
        num_quantizers: int | None = None,
        codebook: str | None = None,
        digest: str | None = None,
        timeout: float | None = None,
    ) -> Generator[Any, None, None]:
        """Return the latents of each of many arrays of indices, lazily and in order; see `decode`."""
        asked = options(
            self.info,
            codebook,
            digest,
            timeout,
            layout=layout,
            dtype=dtype,
            output=output,
            num_quantizers=num_quantizers,
            batched=batched,
        )
        check_on_error(on_error)
        return _each(several(items, "decode"), lambda array: self._decode(array, asked), on_error)

    def codebooks(self, *, timeout: float | None = None) -> list[CodebookInfo]:
        """Return what there is: the one codebook."""
        check_call(timeout=timeout)
        self._open()
        return [self.info]

    def close(self) -> None:
        """Free the codebook's memory. Later calls raise Closed, running calls finish; closing twice is allowed."""
        self._served = self.errors = None

    def encode_rows(
        self, rows: npt.NDArray[np.floating[Any]], *, num_quantizers: int | None = None
    ) -> npt.NDArray[np.int64]:
        """Return the indices of rows that were checked before.

        Args:
            rows: (n, input_dim) float32 or float64, finite, in C order.
            num_quantizers: for a residual codebook, number of indices for each row, validated too; None: all.

        Returns:
            int64: (n,), of a residual codebook (n, num_quantizers).
        """
        return self._open().encode_rows(rows, num_quantizers=num_quantizers)

    def decode_rows(
        self, indices: npt.NDArray[np.int64], *, output: OutputName = "latents", dtype: npt.DTypeLike | None = None
    ) -> npt.NDArray[Any]:
        """Return the rows of indices that were checked before.

        Args:
            indices: int64 in [0, decodable), or where the stages differ in [0, info.stage_vocab_sizes[i]): (n,), of a
                residual codebook (n, q) with the first q indices of each row.
            output: "latents" or "code_rows".
            dtype: what the rows are wanted in, as a hint: a type's `storage` (vqserve.dtypes).

        Returns:
            (n, output_dim) or (n, code_dim) of the codebook's own element type, or already rounded to `dtype`.
        """
        return self._open().decode_rows(indices, output=output, dtype=dtype)

    def count_searches(self, counts: SearchCounts) -> None:
        """Let every later search add to counters: a residual codebook adds for each of its stages."""
        self._served = self._open().counting(counts)

    def check_itself(self) -> None:
        """Encode and decode once, so that nothing is left to be made ready, look for some of the codes, make the probe.

        Raises:
            CodebookError: a code is not found at its own place.
        """
        self.encode_rows(np.ones((1, self.info.input_dim), np.float32))
        indices = (1, self.info.num_quantizers) if self.info.has_stages else 1
        self.decode_rows(np.zeros(indices, np.int64))
        self._open().check_itself()
        self.probe = probe(self)

    def _encode(self, latents: ArrayT, asked: Options) -> ArrayT:
        served = self._open(asked.codebook, asked.digest)
        with self._named(asked):
            indices: Any = given_latents(latents, asked, info=self.info).encoded(served, asked, info=self.info)
        answer: ArrayT = indices
        return answer

    def _decode(self, indices: ArrayT, asked: Options) -> ArrayT:
        served = self._open(asked.codebook, asked.digest)
        with self._named(asked):
            given = given_indices(indices, asked, info=self.info, decodable=self.decodable)
            latents: Any = given.decoded(served, asked)
        answer: ArrayT = latents
        return answer

    def _open(self, codebook: str | None = None, digest: str | None = None) -> Served:
        """Return the codebook, if it is still there and the one that is meant."""
        served = self._served
        if served is None:
            raise Closed("the tokenizer was closed")
        if codebook is not None and codebook != self.info.name:
            raise no_codebook(codebook, [self.info.name], num_codebooks=1)
        if digest is not None and not self.info.digest.startswith(digest):
            raise wrong_digest(digest, info=self.info)
        return served

    @contextmanager
    def _named(self, asked: Options) -> Iterator[None]:
        """Let errors leave the block with the codebook's name, and about the caller's array, as they do in the SDK."""
        try:
            yield
        except VqserveError as error:
            error.codebook = self.info.name
            if asked.batched:
                raise
            raise error.without_batch_axis() from None

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # Earlier releases pickled the form with tensors.
        frozen = vars(self).pop("_frozen", None)
        if frozen is not None:
            from vqserve_server.quantizers.inference.on_device import OnDevice  # noqa: PLC0415

            self._served = OnDevice(frozen)
            self.device, self.weight_dtype = self._served.device, self._served.dtype
        elif "_served" not in state:
            self._served = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        info = self.info
        closed = "" if self._served is not None else ", closed"
        return (
            f"Tokenizer({info.name!r}, kind={info.kind!r}, num_codes={info.num_codes}, code_dim={info.code_dim}, "
            f"digest={info.digest[:12]!r}, device={str(self.device)!r}, search={self.search!r}{closed})"
        )


def _each(items: Iterable[Any], convert: Callable[[Any], Any], on_error: OnError) -> Generator[Any, None, None]:
    """Return the results of arrays, lazily; an error says which array it is about."""
    # A value that cannot be iterated is an error here, not at the first result.
    numbered = enumerate(items)

    def results() -> Generator[Any, None, None]:
        for number, item in numbered:
            key, array = keyed(item)
            failure: VqserveError | None = None
            try:
                result = convert(array)
            except VqserveError as error:
                error.item = number
                if on_error == "raise":
                    raise
                # A copy, without the frames that have the array.
                result, failure = error.with_fields(), error
            yield with_key(key, result)
            if failure is not None and not concerns_one_array(failure, answered=True):
                raise failure.with_fields(item=None)

    return results()
