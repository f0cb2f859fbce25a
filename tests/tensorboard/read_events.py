"""Reads event files of the project's writer (the program write_events, given) with TensorBoard's own package."""
import math
import pathlib
import subprocess
import sys
import tempfile

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util


def write(folder, *arguments):
    subprocess.run([sys.argv[1], folder, *map(str, arguments)], check=True)


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def check(condition, what):
    if not condition:
        sys.exit(f"failed: {what}")


def check_scalars(events, tag, expected):
    found = [(event.step, event.value) for event in events.Scalars(tag)]
    check([step for step, _ in found] == sorted(expected), f"steps of {tag}: {found}")
    for step, value in found:
        check(math.isclose(value, expected[step], rel_tol=1e-6), f"{tag} at step {step}: {value}")


def main():
    with tempfile.TemporaryDirectory() as folder:
        write(folder, 1, 10, 1.0)
        events = read(folder)
        check(sorted(events.Tags()["scalars"]) == ["loss", "rate"], f"tags {events.Tags()}")
        check_scalars(events, "loss", {step: 1.0 / step for step in range(1, 11)})
        check(events.Scalars("loss")[0].wall_time == 1001.0, "wall time")
        text = tensor_util.make_ndarray(events.Tensors("config")[0].tensor_proto)
        check(text.tolist() == ["seed = 7  # **naïve**".encode()], f"text {text}")
        check(events.SummaryMetadata("config").plugin_data.plugin_name == "text", "the text page's name")

        # Killed in the middle of a record, then resumed behind step 5.
        file = next(pathlib.Path(folder).iterdir())
        file.write_bytes(file.read_bytes()[:-7])
        write(folder, 6, 8, 2.0, "--resume")
        files = sorted(pathlib.Path(folder).iterdir())
        check(len(files) == 2 and files[0] == file, f"order of the files: {files}")
        check(len(list(EventFileLoader(str(files[1])).Load())) == 8, "events of the second file")
        expected = {step: (1.0 if step < 6 else 2.0) / step for step in range(1, 9)}
        check_scalars(read(folder), "loss", expected)
        check_scalars(read(folder), "rate", {step: step for step in range(1, 9)})
    print("TensorBoard read scalars, text and a resumed run")


if __name__ == "__main__":
    main()
