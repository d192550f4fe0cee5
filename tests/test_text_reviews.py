"""The published movie reviews: how they are read of their archives, and split."""

import pytest

from litdistill.data import download, fetch
from litdistill.data.text import sets
from tests.texts import said_fixture  # noqa: F401

pytest.importorskip("tokenizers")


# -- movie reviews -----------------------------------------------------------------------------------------------------


def test_movie_reviews_keep_clear_judgements_and_split_by_the_words(tmp_path, monkeypatch):
    lines = [f"{i}\t{mean}\tsome words {i}" for i, mean in enumerate([2.5, 0.5, 0.4, -0.49, -0.5, -3.0] * 20)]
    content = ("\r\n".join(lines) + "\r\n").encode()
    known = fetch.DATASETS["movie_reviews"]
    (file,) = known.digests
    known = known._replace(digests={file: download.digest(content)}, downloaders={"here": lambda _: {file: content}})
    monkeypatch.setitem(fetch.DATASETS, "movie_reviews", known)
    module = sets.movie_reviews(root=str(tmp_path), tokenizer="bpe", vocab_size=60, length=8)
    module.setup()
    assert module.class_names == ("negative", "positive")
    assert len(module.source.train.inputs) + len(module.source.test.inputs) == 80
    assert 8 <= len(module.test_ids) <= 24
    for i in range(len(module.test_ids)):
        number = int(module.show("test", i).rpartition(" ")[2])
        assert module.source.test.targets[i] == int([2.5, 0.5, 0.4, -0.49, -0.5, -3.0][number % 6] > 0)
    offline = sets.movie_reviews(root=str(tmp_path), tokenizer="bpe", vocab_size=60, length=8, download=False)
    offline.setup()
    assert offline.identity("test") == module.identity("test")


def test_a_source_archive_is_read_and_not_built(tmp_path, monkeypatch):
    import io
    import tarfile

    def tar(files):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    archive = tar({"p-1/inner.tar.gz": tar({"in/a.txt": b"words"}), "p-1/setup.py": b"raise SystemExit('built')"})
    page = b'<a href="../../files/p-0.tar.gz#sha256=1">p</a><a HREF = "../../files/p-1.tar.gz#sha256=2&amp;">p</a>'
    asked = []

    def answer(url):
        asked.append(url)
        return page if url.endswith("/") else archive

    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example/simple/")
    monkeypatch.setattr(download, "download", answer)
    take = {"a.txt": "in/a.txt"}
    found = download.source_archive("p", "1", download.digest(archive), take, tmp_path, "p-1/inner.tar.gz")
    assert found == {"a.txt": b"words"}
    assert asked == ["https://index.example/simple/p/", "https://index.example/files/p-1.tar.gz"]
    with pytest.raises(ValueError, match=r"SHA-256 differs"):
        download.source_archive("p", "1", "0" * 64, take, tmp_path)
    with pytest.raises(ValueError, match=r"no p-2.tar.gz"):
        download.source_archive("p", "2", "0" * 64, take, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.network
def test_the_published_movie_reviews(tmp_path):
    module = sets.movie_reviews(root=str(tmp_path), tokenizer="bpe")
    module.setup()
    assert (len(module.source.train.inputs), len(module.source.test.inputs)) == (8033, 2039)
    assert module.source.test.targets.float().mean().item() == pytest.approx(0.5, abs=0.03)
