"""Languages of short captions: what is kept and what is dropped, on captions written for this test."""

from __future__ import annotations

import sys

import pytest

from open_pisces.data.shards import ShardReader, data_path
from open_pisces.datasets import language
from open_pisces.datasets.curate import parse_rule
from open_pisces.datasets.language import LanguageError, in_language, repeated_share, words_of


def table(text: str) -> dict[str, list[str]]:
    """Captions by language, from lines such as ``en: a cat``."""
    found: dict[str, list[str]] = {}
    for line in text.strip().splitlines():
        code, _, caption = line.partition(": ")
        found.setdefault(code, []).append(caption)
    return found


CAPTIONS = table("""
en: a cat on a windowsill
en: two dogs running on the beach
en: red bicycle near a wall
en: Woman holding an umbrella in the rain
en: old wooden bridge over river
en: The children are playing football in the park
de: eine Katze auf der Fensterbank
de: zwei Hunde laufen am Strand
de: rotes Fahrrad an einer Mauer
de: Frau mit Regenschirm im Regen
de: alte Holzbrücke über Fluss
de: Die Kinder spielen Fußball im Park
fr: un chat sur un rebord de fenêtre
fr: deux chiens courent sur la plage
fr: vélo rouge près d'un mur
fr: femme tenant un parapluie
fr: vieux pont en bois
fr: Les enfants jouent au football dans le parc
es: un gato en el alféizar
es: dos perros corren por la playa
es: bicicleta roja junto a un muro
es: mujer con paraguas bajo la lluvia
es: viejo puente de madera
es: Los niños juegan al fútbol en el parque
it: un gatto sul davanzale
it: due cani corrono sulla spiaggia
it: bicicletta rossa vicino a un muro
it: donna con ombrello sotto la pioggia
it: vecchio ponte di legno
it: I bambini giocano a calcio nel parco
pt: um gato no parapeito da janela
pt: dois cães correm na praia
pt: bicicleta vermelha perto de um muro
pt: mulher com guarda-chuva na chuva
pt: velha ponte de madeira
pt: As crianças jogam futebol no parque
nl: een kat op de vensterbank
nl: twee honden rennen op het strand
nl: rode fiets bij een muur
nl: vrouw met paraplu in de regen
nl: oude houten brug
nl: De kinderen voetballen in het park
ru: кошка на подоконнике
ru: две собаки бегут по пляжу
ru: красный велосипед у стены
ru: женщина с зонтом под дождём
ru: старый деревянный мост
ru: Дети играют в футбол в парке
zh: 窗台上的一只猫
zh: 两只狗在海滩上奔跑
zh: 墙边的红色自行车
zh: 雨中撑伞的女人
zh: 古老的木桥
zh: 孩子们在公园里踢足球
ja: 窓辺の猫
ja: ビーチを走る二匹の犬
ja: 壁のそばの赤い自転車
ja: 雨の中で傘をさす女性
ja: 古い木の橋
ja: 公園でサッカーをする子供たち
""")
FOREIGN = table("""
sv: en katt på fönsterbrädan
sv: två hundar springer på stranden
sv: röd cykel vid en vägg
sv: kvinna med paraply i regnet
sv: gammal träbro
sv: Barnen spelar fotboll i parken
pl: kot na parapecie
pl: dwa psy biegną po plaży
pl: czerwony rower przy ścianie
pl: kobieta z parasolem w deszczu
pl: stary drewniany most
pl: Dzieci grają w piłkę w parku
tr: pencere kenarında bir kedi
tr: sahilde koşan iki köpek
tr: duvarın yanında kırmızı bisiklet
tr: yağmurda şemsiyeli kadın
tr: eski ahşap köprü
tr: Çocuklar parkta futbol oynuyor
uk: кішка на підвіконні
uk: дві собаки біжать по пляжу
uk: червоний велосипед біля стіни
uk: жінка з парасолькою
uk: старий дерев'яний міст
uk: Діти грають у футбол у парку
""")
"""Of languages that no rule can name."""


def test_sixty_short_captions_are_kept_in_their_own_language_and_dropped_in_others() -> None:
    lost = [(code, text) for code, texts in CAPTIONS.items() for text in texts if not in_language(text, code)]
    assert not lost
    asked = [(text, other) for code, texts in CAPTIONS.items() for text in texts for other in CAPTIONS if other != code]
    kept = [(text, other) for text, other in asked if in_language(text, other)]
    assert len(asked) == 540 and len(kept) <= 3, kept


def test_captions_in_languages_that_no_rule_names_are_dropped() -> None:
    latin = ("en", "de", "fr", "es", "it", "pt", "nl")
    kept = [(t, code) for key in ("sv", "pl", "tr") for t in FOREIGN[key] for code in latin if in_language(t, code)]
    assert len(kept) <= 4, kept  # of 126
    assert not [text for text in FOREIGN["uk"] if in_language(text, "ru")]


def test_captions_of_two_words_pass_for_their_language() -> None:
    """A model alone calls "a boat" and "a burger" something else: only a much likelier language rules English out."""
    for name in ("fixture/train", "fixture/pairs"):
        reader = ShardReader(data_path(name))
        samples = [reader.words(index) for index in range(len(reader))]
        texts = [text for sample in samples for text in (sample.short, sample.detailed) if text]
        assert len(texts) >= len(reader) and not [text for text in texts if not in_language(text, "en")]


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("A small brown dog is sitting on the grass in front of a house.", "en"),
        ("Ein kleiner brauner Hund sitzt auf dem Gras vor einem Haus.", "de"),
        ("Un petit chien brun est assis dans l'herbe devant une maison avec des fleurs.", "fr"),
        ("Un perro pequeño está sentado en la hierba delante de una casa con las flores.", "es"),
        ("Un piccolo cane è seduto sul prato davanti a una casa con i fiori della nonna.", "it"),
        ("Um pequeno cão está sentado na grama em frente a uma casa com as flores.", "pt"),
        ("Een kleine bruine hond zit op het gras voor een huis met de bloemen.", "nl"),
        ("一只小狗坐在草地上", "zh"),
        ("小さな犬が草の上に座っている", "ja"),
        ("작은 개가 잔디에 앉아 있다", "ko"),
        ("Маленькая собака сидит на траве", "ru"),
        ("كلب صغير يجلس على العشب", "ar"),
        ("ένα μικρό σκυλί κάθεται στο γρασίδι", "el"),
        ("כלב קטן יושב על הדשא", "he"),
        ("एक छोटा कुत्ता घास पर बैठा है", "hi"),
        ("สุนัขตัวเล็กนั่งอยู่บนสนามหญ้า", "th"),
        ("zwykły mały pies siedzi przed domem swojej rodziny", ""),
    ],
)
def test_whole_sentences_are_of_one_language(text: str, codes: str) -> None:
    known = [code for code in language.SCRIPTS if code != "latin"]
    assert [code for code in known if in_language(text, code)] == codes.split()


def test_what_cannot_be_judged_passes() -> None:
    assert in_language("Golden Gate Bridge", "en") and in_language("Golden Gate Bridge", "de")
    assert all(in_language("12:30", code) for code in language.SCRIPTS)
    assert in_language("猫", "zh") and in_language("猫", "ja") and not in_language("猫", "en")


def test_four_fifths_of_the_letters_are_of_the_script() -> None:
    assert in_language("a red cats 猫狗", "en") and not in_language("a red cat 猫狗", "en")  # 8 of 10 letters, 7 of 9
    assert in_language("zwykły mały pies", "latin") and not in_language("простая собака", "latin")


def test_a_missing_library_is_told_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    language.load_identifier.cache_clear()
    with pytest.raises(LanguageError, match=r"py3langid is not installed.*pip install 'open-pisces\[data\]'"):
        parse_rule("language=en,de")
    assert parse_rule("language=latin").value == ("latin",)  # the script alone needs no library


def test_words_are_counted_in_scripts_without_spaces_too() -> None:
    assert words_of('The "Red" dog\'s ball — 3.5 m, well-known!') == [
        "the",
        "red",
        "dog's",
        "ball",
        "3.5",
        "m",
        "well-known",
    ]
    assert words_of("一只猫，two ねこ。") == ["一", "只", "猫", "two", "ね", "こ"]
    assert words_of("एक लाल कुत्ता") == ["एक", "लाल", "कुत्ता"] and words_of(" -- … ") == []


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        ("one two three four five", 0),
        ("dog dog", 1),
        ("a big big dog", 1 / 3),
        ("a cat sat. A cat sat", 1 / 4),  # runs: a-cat-sat twice, of four
        ("go on go on go on go", 3 / 5),
    ],
)
def test_repetition_is_the_share_of_what_came_before(text: str, share: float) -> None:
    assert repeated_share(text) == pytest.approx(share)
