"""Every object key of a run, relative to the store's root."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunKeys:
    """Where the objects of one run lie."""

    run: str

    @property
    def plan(self) -> str:
        """What the run is. Create-once."""
        return f"{self.run}/plan.json"

    def images(self, digest: str) -> str:
        """The image table under its own digest, written before the plan names it."""
        return f"{self.run}/images/{digest[:16]}.parquet"

    def pass_list(self, pass_index: int) -> str:
        """The image rows that pass n (n >= 1) relabels. Create-once."""
        return f"{self.run}/pass-{pass_index}/rows.json"

    def chunks(self, pass_index: int) -> str:
        """Prefix of the chunks of a pass."""
        return f"{self.run}/pass-{pass_index}/chunks/"

    def chunk(self, pass_index: int, chunk: int) -> str:
        """One chunk. Create-once: present means done."""
        return f"{self.chunks(pass_index)}{chunk:06d}.parquet"

    @property
    def progress(self) -> str:
        """Prefix of the heartbeats."""
        return f"{self.run}/progress/"

    def heartbeat(self, pass_index: int, shard: int, shards: int) -> str:
        """State of one shard's newest worker. Overwritten."""
        return f"{self.progress}pass-{pass_index}/{shard:05d}-of-{shards:05d}.json"

    def failure(self, shard: int, shards: int, attempt: str) -> str:
        """The last log lines of a worker that failed, by when and where it was."""
        return f"{self.run}/failures/{shard:05d}-of-{shards:05d}/{attempt}.log"

    def blob(self, sha256: str) -> str:
        """A result that is not a row, by its content. Create-once."""
        return f"{self.run}/blobs/{sha256}"

    @property
    def finals(self) -> str:
        """Prefix of the finals."""
        return f"{self.run}/final/"

    def final(self, digest: str, name: str = "") -> str:
        """A file of one final, or its prefix."""
        return f"{self.run}/final/{digest}/{name}"

    def manifest(self, digest: str) -> str:
        """What a final consists of, written last. A final without it does not exist. Create-once."""
        return self.final(digest, "manifest.json")

    @property
    def refs(self) -> str:
        """Prefix of the numbered references to finals."""
        return f"{self.run}/final/refs/"

    def ref(self, number: int) -> str:
        """The newest reference is "latest". Create-once."""
        return f"{self.refs}{number:06d}.json"

    def evaluation(self, final: str, truth: str, name: str) -> str:
        """A file of the evaluation of a final against one truth."""
        return f"{self.evaluations(final)}{truth}/{name}"

    def evaluations(self, final: str) -> str:
        """Prefix of the evaluations of a final."""
        return f"{self.run}/eval/{final}-"

    def report(self, final: str, name: str) -> str:
        """A file of the report of a final."""
        return f"{self.run}/reports/{final}/{name}"


def embedding_key(encoder: str, form: str, text: str) -> str:
    """A row of class embeddings, shared by all runs. Create-once.

    Args:
        encoder: SHA-256 of the model that made it.
        form: `plain` or `attn12`.
        text: SHA-256 of the prompts.
    """
    return f"embeddings/{encoder[:16]}/{form}/{text}.npy"
