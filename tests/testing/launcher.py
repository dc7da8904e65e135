"""A launcher as mpiexec is one, for tests: `launcher.py N PROGRAM …` starts ranks and ends them."""

import os
import signal
import subprocess
import sys


def main(count, *program):
    ranks = [
        subprocess.Popen(
            program,
            env={
                **os.environ,
                "PMI_RANK": str(rank),
                "PMI_SIZE": str(count),
                "MPI_LOCALRANKID": str(rank),
                "MPI_LOCALNRANKS": str(count),
            },
            start_new_session=True,
        )
        for rank in range(count)
    ]

    def end(*_):
        for rank in ranks:
            rank.kill()

    signal.signal(signal.SIGTERM, end)
    codes = [rank.wait() for rank in ranks]
    killed = [-code for code in codes if code < 0]
    return 128 + killed[0] if killed else max(codes)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
