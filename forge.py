"""python forge.py --config X.yaml | --resume RUN"""

import sys

from forge.train import main

if __name__ == "__main__":
    sys.exit(main())
