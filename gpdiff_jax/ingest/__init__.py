"""In: tables and arrays as cities and public data sets have them. Out: a checked city."""

from gpdiff_jax.ingest.arrays import ARRAY_FILES, Series, read_matrix_file, read_series, series_grid
from gpdiff_jax.ingest.city_tables import ReadingsConfig, city_from_tables, read_graph, read_grid
from gpdiff_jax.ingest.clock import local_times
from gpdiff_jax.ingest.graph import Sites, gaussian_kernel, nearest_sites, read_edges, read_matrix, read_sites
from gpdiff_jax.ingest.plain_pickle import load_plain_pickle
from gpdiff_jax.ingest.readings import Rows, read_rows
from gpdiff_jax.ingest.steps import Grid, grid
from gpdiff_jax.ingest.table_city import TableFacts, fact_lines, table_city

__all__ = [
    "ARRAY_FILES",
    "Grid",
    "ReadingsConfig",
    "Rows",
    "Series",
    "Sites",
    "TableFacts",
    "city_from_tables",
    "fact_lines",
    "gaussian_kernel",
    "grid",
    "load_plain_pickle",
    "local_times",
    "nearest_sites",
    "read_edges",
    "read_graph",
    "read_grid",
    "read_matrix",
    "read_matrix_file",
    "read_rows",
    "read_series",
    "read_sites",
    "series_grid",
    "table_city",
]
