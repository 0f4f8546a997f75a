"""Datasets of the Hugging Face hub, or of a local folder, through the ``datasets`` library.

It finds the files of a split. Those that are parquet, as most are, are read as ``parquet.py`` here reads them,
because the library would hold a whole row group; the others it streams, as Arrow tables, so that pictures stay the
files they were. It neither runs the code of a dataset nor unpickles anything. Columns are those of
``parquet.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from open_pisces.datasets.readers.parquet import ROWS, Columns, table_records
from open_pisces.datasets.records import BadRecord, DatasetImportError, Options, Place, Record, place


def records(address: str, options: Options) -> Iterator[Record | BadRecord]:
    """The rows of one split, in order.

    Args:
        address: ``owner/name`` on the hub, a local folder, or the address of a folder of parquet files.
        options: ``split`` is ``train``, or the only one, if it is not given.

    Raises:
        DatasetImportError: no such dataset, split or column, or a file that is damaged.
    """
    start = place(address)
    base = place(options.images) if options.images else start
    try:
        builder = _builder(address, start)
        tables = hasattr(builder.config, "fragment_scan_options")  # the settings of its parquet reader
        splits = builder.config.data_files if tables else builder.as_streaming_dataset()
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DatasetImportError(f"{address}: {reason}; give a name on the hub or a folder of data files") from None
    split = options.split or ("train" if len(splits) > 1 else next(iter(splits)))
    if split not in splits:
        raise DatasetImportError(f"{address}: has no split {split!r}; it has {', '.join(splits)}")
    if tables:
        for file in splits[split]:
            yield from table_records(place(file), options, base)
    else:
        yield from _streamed(splits[split], address, options, base)


def _builder(address: str, start: Place) -> Any:
    import datasets

    if start.system.isdir(start.root) and "://" in address and not address.startswith("file://"):
        files = [f"{address.rstrip('/')}/{name}" for name in start.files(".parquet")]
        return datasets.load_dataset_builder("parquet", data_files=files)
    return datasets.load_dataset_builder(start.root if start.system.isdir(start.root) else address)


def _streamed(split: Any, address: str, options: Options, base: Place) -> Iterator[Record | BadRecord]:
    import pyarrow as pa

    columns: Columns | None = None
    try:
        for table in split.with_format("arrow").iter(batch_size=ROWS):
            columns = columns or Columns(table.schema.names, options, address)
            for batch in table.select(columns.used).to_batches():
                yield from columns.records(batch, base)
    except (pa.ArrowException, OSError) as error:
        raise DatasetImportError(
            f"{address}: a file of it is damaged or cut short ({error}); get a whole copy"
        ) from None
