"""Every image once, every digest right: the proof that a run is whole. Needs no GPU and no trust in listings."""

import hashlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from mill_jobs.final import file_sha256, read_manifest, read_refs
from mill_jobs.finalize import gather_chunks, record_table
from mill_shared.errors import CoverageError, KeyMissing
from mill_shared.keys import RunKeys
from mill_shared.plan import RunPlan, read_images
from mill_shared.storage import Store


@dataclass
class Verified:
    """What was found. `problems` is empty where the run is whole; each says what to do."""

    images: int
    recorded: int = 0
    chunks: int = 0
    finals: int = 0
    problems: list[str] = field(default_factory=list)


def verify_run(store: Store, plan: RunPlan) -> Verified:
    """Check the image table, every chunk, every record's place, every blob and every referenced final."""
    found = Verified(plan.images)
    rows = {row: image for row, image in read_images(store, plan)}
    if len(rows) != plan.images:
        found.problems.append(f"the image table has {len(rows)} rows, the plan {plan.images}; plan the run anew")
    with tempfile.TemporaryDirectory(prefix="mill-verify-") as name:
        scratch = Path(name)
        gathered = gather_chunks(store, plan, scratch)
        found.chunks = len(gathered.chunks)
        for index, chunk, why in gathered.missing:
            remedy = "label the run again" if why == "missing" else "label the run again with --repair"
            found.problems.append(f"pass {index}, chunk {chunk}: {why}; {remedy}")
        try:
            with record_table(gathered, plan, scratch) as table:
                seen: set[int] = set()
                blobs: set[str] = set()
                records = table.connection.execute(
                    "select row, image_id, key, list_transform(files, lambda f: f.sha256) from records order by row"
                )
                while batch := records.fetchmany(65_536):
                    for row, image_id, key, files in batch:
                        image = rows.get(row)
                        if image is None or (image.image_id, image.key) != (image_id, key):
                            found.problems.append(
                                f"row {row}: the record is of image {image_id} {key}, not of the plan"
                            )
                        if row in seen:
                            found.problems.append(f"row {row}: image {key} has two records")
                        seen.add(row)
                        blobs.update(files or ())
                found.recorded = len(seen)
        except CoverageError:
            blobs = set()
    for sha256 in sorted(blobs):
        _check(found, store, RunKeys(plan.run).blob(sha256), sha256)
    for final in dict.fromkeys(ref.final for ref in read_refs(store, plan.run)):
        found.finals += 1
        manifest = read_manifest(store, plan.run, final)
        if manifest is None:
            found.problems.append(f"final {final}: referenced, but its manifest is missing; finalize again")
            continue
        for entry in manifest.files:
            _check(found, store, RunKeys(plan.run).final(final, entry.name), entry.sha256)
    return found


def _check(found: Verified, store: Store, key: str, sha256: str) -> None:
    with tempfile.NamedTemporaryFile(prefix="mill-verify-") as scratch:
        path = Path(scratch.name)
        try:
            store.get_file(key, path)
        except KeyMissing:
            found.problems.append(f"{key}: missing; finalize or label again")
            return
        actual = file_sha256(path) if path.stat().st_size else hashlib.sha256(b"").hexdigest()
        if actual != sha256:
            found.problems.append(
                f"{key}: its SHA-256 is {actual[:12]}..., expected {sha256[:12]}...; finalize or label again"
            )
