import sys
from pathlib import Path

# Shared helpers (certificates.py, processes.py) are imported by name from every folder of tests.
sys.path.insert(0, str(Path(__file__).parent))
