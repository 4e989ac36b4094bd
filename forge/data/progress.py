"""Progress bars of the libraries, which are noise in a file."""

import datasets
import transformers


def hide_progress_bars() -> None:
    """Turn off the bars of datasets and transformers; the log reports the same in lines."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
