"""Any TFDS data set as a `Dataset`, without TensorFlow.

TFDS reads its array_record files with numpy alone. Preparing a data set may still
need TensorFlow (its image encoder does), reading one never does.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from jaxzoo.data.source import Dataset, Feature

__all__ = ["tfds_dataset"]


def tfds_dataset(
    name: str,
    *,
    data_dir: str | PathLike[str] | None = None,
    splits: Mapping[str, str] | Sequence[str] | None = None,
    download: bool = False,
) -> Dataset:
    """A prepared TFDS data set by TFDS's own name.

    Args:
      name: as in `tfds.builder`: "mnist", "mnist:3.0.1", "glue/sst2", or that of an
        own builder prepared under `data_dir`.
      data_dir: root folder of prepared data sets; None is TFDS's default.
      splits: None for all of them; a list of TFDS split expressions, each its own
        name; or {our name: expression}, as in {"train": "train[:90%]"}.
      download: whether TFDS may download and prepare what is not there. Never
        without being asked.

    Returns:
      A data set whose splits are random-access sources of numpy records with the
      dtypes of `features` (text and other bytes stay `bytes`), for `take`, `batch`
      and Grain.

    Raises:
      ImportError: tensorflow-datasets is not installed.
      FileNotFoundError: the data set is not prepared in `data_dir`.
      ValueError: name or split is unknown, or the files are not array_record.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"tfds_dataset needs tensorflow-datasets ({error}): "
            "pip install 'jaxzoo-papers[tfds]'"
        ) from None
    if isinstance(splits, str):
        raise ValueError(
            f"splits={splits!r} is one string, expected a list of split expressions "
            "or a dict."
        )
    where = "TFDS's default folder" if data_dir is None else f"data_dir={str(data_dir)}"
    place = None if data_dir is None else str(data_dir)
    builder: Any  # TFDS's annotations lag behind what its builders offer
    try:
        builder = tfds.builder(name, data_dir=place)
    except tfds.core.DatasetNotFoundError:
        # TFDS's own message lists a thousand names.
        raise ValueError(
            f"name={name!r} is not a data set of the installed TFDS, and {where} holds "
            "none prepared under that name."
        ) from None
    if not builder.is_prepared():
        if not download:
            raise FileNotFoundError(
                f"name={name!r} is not prepared in {where}; with a network call "
                f"tfds_dataset({name!r}, ..., download=True) once, or copy a prepared "
                "folder there."
            )
        builder = tfds.builder(name, data_dir=place, file_format="array_record")
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(download_config=config)
    info = builder.info
    if splits is None:
        splits = list(info.splits)
    wanted = splits if isinstance(splits, Mapping) else {s: s for s in splits}
    sources = {}
    for key, expression in wanted.items():
        try:
            found = builder.as_data_source(split=expression)
        except NotImplementedError:
            raise ValueError(
                f"name={name!r} lies in {where} as {info.file_format}, which has no "
                "random access; prepare it again with file_format='array_record'."
            ) from None
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"splits: {expression!r} of {name!r} cannot be read ({error}); it has "
                f"{', '.join(map(repr, info.splits))}."
            ) from None
        label = f"split {expression!r} of {name!r} in {where}"
        sources[key] = _TfdsSplit(found, info.features.np_dtype, label)
    return Dataset(
        name=info.full_name,
        splits=sources,
        description=info.description,
        features={key: _feature(value) for key, value in info.features.items()},
        licence=info.redistribution_info.license or "not stated by TFDS",
    )


class _TfdsSplit:
    """A TFDS data source whose records have the dtypes that its features promise.

    TFDS hands scalars out as Python numbers, so float32 would come back as float64.
    """

    def __init__(self, source: Any, dtypes: Any, label: str) -> None:
        self._source, self._dtypes, self._label = source, dtypes, label

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[Any]) -> list[dict[str, Any]]:
        ids = [operator.index(i) for i in indices]
        for i in ids:
            if not 0 <= i < len(self):
                raise IndexError(f"index={i} is not in [0, {len(self)}).")
        try:
            records = self._source.__getitems__(ids)
        except RuntimeError as error:  # what array_record raises for damaged bytes
            if len(ids) > 1:
                return [self[i] for i in ids]  # one of them fails, and is named
            raise ValueError(
                f"{self._label} is damaged at record {ids[0]}: {error}; prepare or copy"
                " it again."
            ) from None
        return [_cast(record, self._dtypes) for record in records]

    def __repr__(self) -> str:
        return f"_TfdsSplit({len(self)} records: {self._label})"


def _cast(value: Any, dtype: Any) -> Any:
    if isinstance(dtype, Mapping) and isinstance(value, Mapping):
        return {key: _cast(item, dtype[key]) for key, item in value.items()}
    plain = isinstance(value, (bool, int, float, list, np.generic, np.ndarray))
    if isinstance(dtype, Mapping) or not plain or np.dtype(dtype) == object:
        return value
    try:
        return np.asarray(value, dtype)[()]
    except ValueError:  # ragged lists stay lists
        return value


def _feature(feature: Any) -> Feature:
    """What TFDS says of one entry of a record; nested entries have no one shape."""
    dtype: Any = feature.np_dtype
    flat = isinstance(feature.shape, tuple) and not hasattr(dtype, "keys")
    classes = getattr(feature, "num_classes", None)
    return Feature(
        shape=feature.shape if flat else (),
        dtype=np.dtype(dtype).name if flat else "nested",
        range=(0, classes - 1) if classes else None,
        meaning=" ".join(repr(feature).split()),
    )
