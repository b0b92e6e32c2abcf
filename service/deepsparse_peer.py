"""DeepSparse in an interpreter of its own, for `dsformer-bench --deepsparse PYTHON`: it fits no current environment.

    PYTHON service/deepsparse_peer.py THREADS

Says "ready", then for each line "BATCH TOKENS FILE" on standard input runs that ONNX graph once and says "done". Stands
alone: nothing of this project, and only NumPy and DeepSparse, need be there.
"""

import sys

import numpy as np


def main() -> None:
    from deepsparse import Engine

    threads = int(sys.argv[1])
    engines = {}
    print("ready", flush=True)
    for line in sys.stdin:
        batch, tokens, file = line.rstrip("\n").split(" ", 2)
        shape = int(batch), int(tokens)
        if shape not in engines:
            engines[shape] = Engine(file, batch_size=shape[0], num_cores=threads)
        feed = {"input_ids": np.full(shape, 5), "attention_mask": np.ones(shape), "token_type_ids": np.zeros(shape)}
        engines[shape].run([feed[name].astype(np.int64) for name in engines[shape].input_names])
        print("done", flush=True)


if __name__ == "__main__":
    main()
