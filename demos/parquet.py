"""Parquet tables, by the package pyarrow: columns of numbers as arrays, pictures as their bytes."""
from pathlib import Path

from robot.errors import UserError, few, nearest, one_line

HELD = 2**28                    # bytes of columns that are kept for the next call


def import_parquet(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: a LeRobot data set needs the package pyarrow: pip install pyarrow av"
                        ) from None
    return pyarrow.parquet


class Tables:
    """Columns of the parquet files of a folder, read when they are asked for; the last ones are kept. Raises
    UserError."""

    def __init__(self, root):
        self.parquet, self.kept = import_parquet(root), {}

    def open(self, file):
        try:
            return self.parquet.ParquetFile(file)
        except FileNotFoundError:
            raise UserError(f"{file} is missing: copy it again") from None
        except (OSError, ValueError) as error:              # pyarrow's errors are ValueErrors
            raise UserError(f"{file} is cut short or damaged, copy it again: {one_line(error, 100)}"
                            ) from None

    def rows(self, path, without="stats/"):
        """Rows of a file, or of all files of a folder, as dicts. `without`: columns that are passed over."""
        path, found = Path(path), []
        for file in sorted(path.rglob("*.parquet")) if path.is_dir() else [path]:
            table = self.open(file)
            columns = [name for name in table.schema_arrow.names if not name.startswith(without)]
            found += self._read(file, lambda: table.read(columns=columns, use_threads=False)).to_pylist()
        if not found:
            raise UserError(f"{path} is missing or empty: copy it again")
        return found

    def column(self, file, key):
        """Numbers (N, ...) of a column, where every row is a number or lists of equal length."""
        if (file, key) not in self.kept:
            table = self.open(file)
            if key not in table.schema_arrow.names:
                raise UserError(f"{file} has no column '{key}'{nearest(key, table.schema_arrow.names)}")
            column = self._read(file, lambda: table.read(columns=[key], use_threads=False))[key]
            self._keep((file, key), numbers(column.combine_chunks(), f"{file}: '{key}'"))
        return self.kept[file, key]

    def pictures(self, file, key, lo, hi):
        """[bytes or None] of the pictures in rows lo .. hi-1. Only the groups of rows that hold them are
        read."""
        table, at, found = self.open(file), 0, []
        for group in range(table.num_row_groups):
            n = table.metadata.row_group(group).num_rows
            a, b = max(lo - at, 0), min(hi - at, n)
            if a < b:
                name = (file, key, group)
                if name not in self.kept:
                    read = self._read(file, lambda: table.read_row_group(group, [key], use_threads=False))
                    self._keep(name, read[key])
                found += [(row or {}).get("bytes") for row in self.kept[name][a:b].to_pylist()]
            at += n
        return found

    def _read(self, file, read):
        try:
            return read()
        except (OSError, ValueError) as error:
            raise UserError(f"{file} is damaged, copy it again: {one_line(error, 100)}") from None

    def _keep(self, name, column):
        self.kept[name] = column
        while len(self.kept) > 1 and sum(x.nbytes for x in self.kept.values()) > HELD:
            self.kept.pop(next(iter(self.kept)))


def numbers(column, where):
    """A column of pyarrow as an array; lists become axes."""
    import pyarrow.compute
    shape, lists = [len(column)], ("is_list", "is_large_list", "is_fixed_size_list")
    while any(getattr(pyarrow.types, kind)(column.type) for kind in lists):
        lengths = pyarrow.compute.list_value_length(column).unique().to_pylist()
        if len(lengths) > 1 or None in lengths:
            raise UserError(f"{where} has rows of {few(sorted(map(str, lengths)))} numbers: mend them")
        shape += lengths
        column = column.flatten()
    if column.null_count:
        raise UserError(f"{where} has {column.null_count} rows without a value: cut these steps")
    values = column.to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "fiub":
        raise UserError(f"{where} holds {one_line(column.type, 40)}, no numbers")
    return values.reshape(shape)
