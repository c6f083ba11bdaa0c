import av
import numpy as np
import pytest

from models import video_files

H264_AT_CRF_16 = 33.0  # dB on a smooth film: colour at half the resolution, and the quantizer


def film(frames=9, height=64, width=96):
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([128 + 100 * np.sin((x + c * y) / 15 + t / 5) for c in (0, 1, 2)], -1).astype(np.uint8)


def test_a_film_comes_back_as_h264_with_its_frames(tmp_path):
    frames = film()
    video_files.write_mp4(frames, tmp_path / "a.mp4", fps=16)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 16
    back = video_files.read_mp4(tmp_path / "a.mp4")
    assert back.shape == frames.shape
    assert 10 * np.log10(255**2 / np.mean((frames.astype(float) - back) ** 2)) > H264_AT_CRF_16


def test_grey_keeps_its_level(tmp_path):
    frames = np.full((3, 32, 32, 3), 77, np.uint8)
    video_files.write_mp4(frames, tmp_path / "grey.mp4", fps=8)
    assert abs(video_files.read_mp4(tmp_path / "grey.mp4").astype(int) - 77).max() <= 2


def test_the_index_stands_in_front_of_the_frames(tmp_path):
    video_files.write_mp4(film(), tmp_path / "a.mp4", fps=16)
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("shape", [(3, 33, 32, 3), (3, 32, 31, 3), (0, 32, 32, 3), (3, 32, 32, 4)])
def test_odd_sizes_no_frames_and_alpha_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match="uint8"):
        video_files.write_mp4(np.zeros(shape, np.uint8), tmp_path / "a.mp4", fps=8)


def test_a_contact_sheet_holds_a_row_a_film():
    sheet = video_files.contact_sheet([film(), film()], columns=3, gap=4)
    assert sheet.size == (3 * 96 + 2 * 4, 2 * 64 + 4)
