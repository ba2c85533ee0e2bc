import sys
from pathlib import Path

# Helpers that tests of several folders share are imported by name.
sys.path.insert(0, str(Path(__file__).parent / "support"))
