"""In: tables as cities export them. Out: a checked city."""

from gpdiff_jax.ingest.clock import local_times
from gpdiff_jax.ingest.graph import Sites, gaussian_kernel, nearest_sites, read_edges, read_matrix, read_sites
from gpdiff_jax.ingest.readings import Grid, Rows, grid, read_rows
from gpdiff_jax.ingest.table_city import TableFacts, fact_lines, table_city

__all__ = [
    "Grid",
    "Rows",
    "Sites",
    "TableFacts",
    "fact_lines",
    "gaussian_kernel",
    "grid",
    "local_times",
    "nearest_sites",
    "read_edges",
    "read_matrix",
    "read_rows",
    "read_sites",
    "table_city",
]
