"""Folders for decoders that read files; gone with the process."""

import atexit
import shutil
import tempfile
from pathlib import Path


def scratch_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="baton-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
