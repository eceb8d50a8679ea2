"""The picture of the house in docs/ shows today's rooms and imports."""

import draw_house


def test_the_picture_shows_todays_rooms_and_imports():
    svg = draw_house.PICTURE.read_text(encoding="utf-8")
    assert draw_house.drawn(svg) == draw_house.plan(), "run python tests/draw_house.py"
    for folder, rooms in draw_house.plan()["rooms"].items():
        for name in [f"{folder}/" if rooms else folder, *rooms]:
            assert f">{name}</text>" in svg, name


def test_the_same_imports_give_the_same_picture(tmp_path):
    first, second = tmp_path / "1.svg", tmp_path / "2.svg"
    draw_house.save(first)
    draw_house.save(second)
    assert first.read_bytes() == second.read_bytes()


def test_arrows_that_follow_from_others_are_left_out():
    imports = [["a", "b"], ["a", "c"], ["b", "c"]]
    assert draw_house._needed(imports) == [("a", "b"), ("b", "c")]
