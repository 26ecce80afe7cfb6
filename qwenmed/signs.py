"""Which signs a text speaks of, and whether they are there now: not denied, past, supposed or told of others.

The words lie in urgency/signs.csv and urgency/cues.csv, for a doctor to read and correct. They are found by an
Aho–Corasick automaton, once as written and once by sound (homophones: 呼吸困南), so the time grows with the
text's length only. A word pair `A~B` is found when B follows A closely; `@name` and `@@name` stand for a row's
words (`@@` for parts of the body, of which only the nearest counts); `_` stands for a space.
"""

import bisect
import csv
import functools
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

TABLES = Path(__file__).with_name("urgency")

STRONG_STOPS = frozenset("。！？!?；;\n")
CLAUSE_STOPS = STRONG_STOPS | frozenset("，,：:")
PAIR_GAP = 7  # characters between the two words of a pair
SOUND_LENGTH = 3  # shorter words have too many homophones
NEGATION_REACH = 16
SHORT_NEGATION_REACH = 1
HEALED_REACH = 40
PIECE_LENGTH = 150

# Traditional characters (and some Cantonese ones) with what the tables have for them, one after the other.
_PAIRS = (
    "萬万業业東东絲丝兩两嚴严喪丧個个臨临爲为舉举麼么義义烏乌樂乐習习書书買买亂乱於于亞亚產产親亲僅仅從从侖仑儀仪價价衆众優优夥伙會会傳传傷伤倫伦體体側侧傾倾"
    "兒儿兌兑黨党關关養养內内寫写軍军農农凍冻淨净準准涼凉減减幾几擊击劃划則则剛刚別别劑剂剝剥劇剧辦办動动勁劲區区醫医華华單单賣卖滷卤臥卧衛卫卻却歷历厲厉壓压"
    "厭厌廁厕參参雙双發发變变疊叠臺台葉叶號号嘆叹喫吃後后嚇吓嗎吗聽听嘔呕員员嗆呛嚨咙響响啞哑譁哗脣唇喚唤噴喷囑嘱嚕噜團团園园圍围圓圆場场壞坏塊块堅坚墜坠聲声"
    "殼壳處处備备復复夠够頭头夾夹獎奖奧奥婦妇媽妈嬰婴孫孙學学寧宁寶宝實实寵宠宮宫對对尋寻導导爾尔尷尴盡尽層层屜屉屬属歲岁島岛嶽岳幣币帥帅師师簾帘帶带幫帮幹干"
    "並并牀床應应開开異异張张彎弯彈弹強强歸归當当錄录徵征憶忆懷怀總总惡恶驚惊懼惧慘惨願愿戲戏戰战戶户撲扑執执摳抠搶抢護护報报擔担擬拟擰拧撥拨擇择攣挛撓挠擋挡"
    "擠挤撈捞換换據据擺摆搖摇撐撑攢攒敵敌數数斷断無无舊旧時时顯显曬晒曉晓暈晕暫暂術术機机殺杀槓杠條条來来棗枣槍枪梔栀標标樹树樣样橋桥夢梦檢检樓楼櫻樱殘残畢毕"
    "氣气氫氢湯汤溝沟瀝沥淚泪瀉泻潑泼潔洁灑洒淺浅濁浊測测渾浑濃浓塗涂湧涌滌涤澀涩滲渗溫温遊游溼湿潰溃濺溅滾滚滿满灘滩瀦潴瀕濒滅灭燈灯靈灵災灾爐炉點点爛烂煙烟"
    "煩烦燒烧燙烫熱热燜焖愛爱爺爷牽牵狀状豬猪貓猫環环現现電电畫画療疗瘍疡瘡疮瘋疯皰疱痙痉癢痒癇痫癡痴癱瘫癲癫皁皂皺皱鹽盐監监盤盘睜睁確确礙碍鹼碱禍祸離离種种"
    "祕秘積积稱称穩稳竄窜窩窝筆笔篩筛籤签簡简籃篮類类糞粪糉粽緊紧紅红級级紀纪紗纱紙纸紐纽線线紺绀練练細细織织絆绊紹绍經经結结給给絕绝絞绞統统繼继續续繩绳維维"
    "綿绵繃绷綜综綠绿緩缓緣缘縫缝纏缠縮缩網网羅罗羨羡羣群翹翘聾聋職职腸肠膚肤腎肾腫肿脹胀膽胆膠胶脈脉髒脏臍脐腦脑膿脓腳脚脫脱臉脸膩腻藝艺蒼苍蘇苏蘋苹範范薦荐"
    "蕩荡蕁荨藥药藍蓝慮虑虛虚蟲虫蝦虾蟄蛰蠟蜡蠍蝎裝装褲裤見见觀观規规視视覺觉觸触計计認认討讨讓让訓训記记講讲論论設设訣诀證证評评識识訴诉診诊詞词譯译試试話话"
    "該该詳详語语誤误誘诱說说誦诵請请諾诺讀读課课調调談谈謂谓謠谣譜谱貝贝敗败貨货質质貫贯賤贱費费資资賠赔賴赖蹤踪車车軋轧軌轨轉转輪轮軟软輕轻輩辈輸输邊边達达"
    "過过運运還还這这進进遠远連连遲迟適适選选遺遗鄰邻鬱郁醬酱採采釋释裏里鑑鉴針针釘钉鈍钝鍾钟鋼钢鉤钩鈕钮錢钱鑽钻鐵铁鋁铝銀银銷销鎖锁鋰锂鍋锅鏽锈鋅锌錯错鑼锣"
    "錘锤鋸锯鎮镇鏡镜長长門门閃闪閉闭問问間间悶闷鬧闹閨闺聞闻闌阑隊队陽阳陰阴陣阵險险隱隐難难靂雳霧雾黴霉靜静頂顶項项順顺顧顾頓顿預预頸颈頜颌頻频顆颗題题額额"
    "顳颞顛颠顫颤風风飄飘飆飙飛飞飯饭飲饮餃饺餓饿饅馒馬马驅驱驗验驟骤魚鱼鮮鲜鯊鲨雞鸡鳴鸣鵝鹅黃黄齊齐齒齿齡龄齦龈龍龙為为眾众汙污洩泄痺痹著着睪睾裡里衞卫濕湿"
    "説说鈎钩唔不冇没咗了瞓睡佢他喺在攞拿嚟来麽么"
)
_TRADITIONAL = str.maketrans(dict(zip(_PAIRS[::2], _PAIRS[1::2], strict=True)))


class _Word(NamedTuple):
    """A word of the tables, with everything it can mean.

    `left` and `body` are the groups in which it can begin a pair; of a part of the body (`@@`) only the nearest does.
    """

    length: int
    traits: int
    cues: tuple[str, ...] = ()
    signs: tuple[tuple[str, str], ...] = ()  # (sign, kind)
    left: tuple[str, ...] = ()
    right: tuple[dict[str, tuple[tuple[str, str], ...]], ...] = ()
    body: tuple[str, ...] = ()


# Traits: a neutral phrase; a mark that denies; a sign whose own words deny (没有意识).
_NEUTRAL, _DENIAL, _DENYING_SIGN = 1, 2, 4

# A word of the tables in the text: half-open [start, end).
_Hit = tuple[int, int, _Word]


@dataclass(frozen=True)
class Findings:
    """What a text says.

    Attributes:
        present: sign → the words, for signs that are there now, and for circumstances.
        cues: names of the language marks in the text.
    """

    present: dict[str, str]
    cues: frozenset[str]


def normalise(text: str) -> str:
    """Half-width, lower case, simplified; zero-width characters and blanks between Chinese characters removed."""
    text = unicodedata.normalize("NFKC", text).lower()
    if text.isascii():
        return " ".join(text.split())
    text = text.translate(_TRADITIONAL)
    if text.isprintable() and " " not in text:
        return text
    return _BLANK.sub("", "".join(c for c in text if c.isprintable() or c in " \n"))


# A blank, unless it stands between two Latin words or numbers.
_BLANK = re.compile(r"(?<![!-~]) | (?![!-~])")


def find_signs(text: str) -> Findings:
    """The signs of a normalised text, read piece by piece so that the time stays proportional to its length."""
    present: dict[str, str] = {}
    cues: set[str] = set()
    for piece in _pieces(text):
        _read_piece(piece, present, cues)
    return Findings(present, frozenset(cues))


def _pieces(text: str) -> Iterable[str]:
    start = 0
    while len(text) - start > PIECE_LENGTH:
        end = max(text.rfind(stop, start, start + PIECE_LENGTH) for stop in STRONG_STOPS) + 1
        end = end if end > start else start + PIECE_LENGTH
        yield text[start:end]
        start = end
    yield text[start:]


def _read_piece(text: str, present: dict[str, str], cues: set[str]) -> None:
    hits = _tables().hits(text)
    marks: dict[str, list[tuple[int, int]]] = {}
    for start, end, word in hits:
        for name in word.cues:
            marks.setdefault(name, []).append((start, end))
    cues.update(marks)
    reader = _Reader(text, marks)
    for i, (start, end, word) in enumerate(hits):
        for sign in word.signs:
            reader.keep(present, sign, start, end, start)
        if word.right:
            for begin, signs in _pairs_ending(text, hits, i):
                for sign in signs:
                    reader.keep(present, sign, begin, end, start)


def _pairs_ending(text: str, hits: list[_Hit], i: int) -> Iterable[tuple[int, tuple[tuple[str, str], ...]]]:
    """(start, signs) for the pairs of which hits[i] is the second word."""
    middle, _, second = hits[i]
    for wanted in second.right:
        body = 0
        for j in range(i - 1, -1, -1):
            start, end, first = hits[j]
            gap = middle - end
            if gap > PAIR_GAP + 6:
                break
            if gap < 0 or gap > PAIR_GAP or not (first.left or first.body):
                continue
            if gap and not STRONG_STOPS.isdisjoint(text[end:middle]):
                break
            groups = first.left
            if first.body and end >= body:  # words that overlap the nearest (半边身子 and 身子) are the same part
                body = end
                groups = first.body + groups
            for name in groups:
                if name in wanted:
                    yield start, wanted[name]


# The marks that can make a sign not count.
_DOUBTS = frozenset({"否定", "否定短", "后否定", "痊愈", "过去", "假设句", "转述", "可能"})


class _Reader:
    """Decides from the marks around it whether a sign is there now."""

    def __init__(self, text: str, marks: dict[str, list[tuple[int, int]]]) -> None:
        self.text = text
        self.marks = marks
        self.doubts = not _DOUBTS.isdisjoint(marks)
        if not self.doubts:
            return
        self.clauses = [0, *(i for i, c in enumerate(text, 1) if c in CLAUSE_STOPS)]
        self.sentences = [0, *(i for i in self.clauses[1:] if text[i - 1] in STRONG_STOPS)]

    def keep(self, present: dict[str, str], sign: tuple[str, str], start: int, end: int, middle: int) -> None:
        """Note a sign with its words at [start, end), if it is there; `middle` is where a pair's second word starts."""
        name, kind = sign
        # The longest words are kept: one word must not fire two parts of a rule.
        if name in present and len(present[name]) >= end - start:
            return
        if kind != "境":
            if self.doubts and self._doubted(start, end, middle):
                return
            if kind == "病" and not self._any("急性", max(0, start - 30), min(len(self.text), end + 30)):
                return
        present[name] = self.text[start:end]

    def _doubted(self, start: int, end: int, middle: int) -> bool:
        sentence = self.sentences[bisect.bisect_right(self.sentences, start) - 1]
        clause = self.clauses[bisect.bisect_right(self.clauses, start) - 1]
        if self._denied(clause, start, end, middle) or self._past(sentence, start, end):
            return True
        if self._any("假设句", sentence, start) or self._any("转述", sentence, start):
            return True
        return self._any("可能", max(clause, start - 12), start) and not self._any("急性", sentence, end)

    def _denied(self, clause: int, start: int, end: int, middle: int) -> bool:
        for s, e in self.marks.get("否定", ()):
            if clause <= s and e <= start and start - e <= NEGATION_REACH and not self._any("转折", e, start):
                return True
            if start < s and e <= middle:
                return True
        for s, e in self.marks.get("否定短", ()):
            if (clause <= s and e <= start and start - e <= SHORT_NEGATION_REACH) or (start < s and e == middle):
                return True
        return any(end <= s <= end + 2 for s, _ in self.marks.get("后否定", ()))

    def _past(self, sentence: int, start: int, end: int) -> bool:
        for s, e in self.marks.get("痊愈", ()):
            if end <= s < end + HEALED_REACH and not self._any("现在", e, len(self.text)):
                return True
        past = [e for s, e in self.marks.get("过去", ()) if sentence <= s and e <= start + 1]
        return bool(past) and not self._any("现在", max(past), max(start, end) + 1)

    def _any(self, name: str, start: int, end: int) -> bool:
        return any(start <= s and e <= end for s, e in self.marks.get(name, ()))


class _Tables:
    """The words of both tables as automata."""

    def __init__(self) -> None:
        import ahocorasick

        self.words: dict[str, set[tuple[str, str]]] = {}
        self.kinds: dict[str, str] = {}
        self.pairs: dict[str, dict[str, set[str]]] = {}  # right group → left group → signs
        self._read()
        self.written, self.spoken = ahocorasick.Automaton(), ahocorasick.Automaton()
        self.sounds = _sounds()
        self.lefts = {left for wanted in self.pairs.values() for left in wanted}
        by_sound: dict[str, set[tuple[str, str]]] = {}
        for word, roles in self.words.items():
            entry = self._word(word, roles)
            self.written.add_word(word, entry)
            if (
                len(word) >= SOUND_LENGTH
                and entry.signs
                and not entry.traits & _DENYING_SIGN
                and all("一" <= c <= "鿿" for c in word)
            ):
                by_sound.setdefault(self._sound(word), set()).update(entry.signs)
        for sound, signs in by_sound.items():
            self.spoken.add_word(sound, _Word(len(sound), 0, signs=tuple(sorted(signs))))
        self.written.make_automaton()
        self.spoken.make_automaton()

    def hits(self, text: str) -> list[_Hit]:
        """Every word of the tables in the text, by its start; none that lies inside of a neutral phrase."""
        found, traits = [], 0
        for last, word in self.written.iter(text):
            found.append((last + 1 - word[0], last + 1, word))
            traits |= word[1]
        if traits & _NEUTRAL:
            neutral = [hit for hit in found if hit[2].traits & _NEUTRAL]
            found = [hit for hit in found if not _swallowed(hit, neutral)]
        if not text.isascii():
            spoken = [(last + 1 - word[0], last + 1, word) for last, word in self.spoken.iter(self._sound(text))]
            if spoken:
                written = {hit[:2] for hit in found}
                found += [hit for hit in spoken if hit[:2] not in written]
        if traits & _DENYING_SIGN:
            found = _without_cut_signs(found)
        if traits & _DENIAL:  # a denial inside of a sign's own word (没有意识) denies nothing
            signs = [hit for hit in found if hit[2].signs]
            found = [hit for hit in found if not (hit[2].traits & _DENIAL and _lies_in(hit, signs))]
        found.sort()
        return found

    def _sound(self, text: str) -> str:
        return "".join(map(self.sounds.get, text, text))

    def _word(self, word: str, roles: set[tuple[str, str]]) -> _Word:
        cues, signs, groups = (
            sorted(name for role, name in roles if role == kind) for kind in ("cue", "sign", "group")
        )
        traits = _NEUTRAL if "中性" in cues else 0
        if cues and cues[0] in _DENIALS:
            traits |= _DENIAL
        if signs and not _DENYING.isdisjoint(word):
            traits |= _DENYING_SIGN
        return _Word(
            len(word),
            traits,
            cues=tuple(cues),
            signs=self._with_kinds(signs),
            left=tuple(name for name in groups if name in self.lefts and not name.startswith("@@")),
            right=tuple(
                {left: self._with_kinds(signs) for left, signs in self.pairs[name].items()}
                for name in groups
                if name in self.pairs
            ),
            body=tuple(name for name in groups if name.startswith("@@")),
        )

    def _with_kinds(self, signs: Iterable[str]) -> tuple[tuple[str, str], ...]:
        return tuple((name, self.kinds[name]) for name in sorted(signs))

    def _read(self) -> None:
        with (TABLES / "cues.csv").open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                for word in row["词语"].split():
                    self._add(word, ("cue", row["语言标记"]))
        with (TABLES / "signs.csv").open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            name = row["征象"]
            if name.startswith("@"):
                for word in row["词语"].split():
                    self._add(word, ("group", name))
                continue
            self.kinds[name] = "境" if "境" in row["类"] else row["类"]
            for word in row["词语"].split():
                left, is_pair, right = word.partition("~")
                if is_pair:
                    self.pairs.setdefault(self._group(right), {}).setdefault(self._group(left), set()).add(name)
                else:
                    self._add(word, ("sign", name))

    def _group(self, word: str) -> str:
        if not word.startswith("@"):
            self._add(word, ("group", f"={word}"))
            return f"={word}"
        return word

    def _add(self, word: str, role: tuple[str, str]) -> None:
        self.words.setdefault(word.replace("_", " ").lower(), set()).add(role)


_DENYING = frozenset("没不无")
_DENIALS = frozenset({"否定", "否定短"})


def _without_cut_signs(found: list[_Hit]) -> list[_Hit]:
    """Drop 没有呼吸 where the text goes on to 没有呼吸困难: the longer sign begins inside of it."""
    signs = [hit for hit in found if hit[2].signs]
    denying = [hit for hit in signs if hit[2].traits & _DENYING_SIGN]
    cut = {hit[:2] for hit in denying for other in signs if hit[0] < other[0] < hit[1] < other[1]}
    return [hit for hit in found if hit[:2] not in cut] if cut else found


def _swallowed(hit: _Hit, neutral: list[_Hit]) -> bool:
    return any(n[0] <= hit[0] and hit[1] <= n[1] and n[:2] != hit[:2] for n in neutral)


def _lies_in(hit: _Hit, signs: list[_Hit]) -> bool:
    return any(sign[0] <= hit[0] and hit[1] <= sign[1] for sign in signs)


@functools.cache
def _tables() -> _Tables:
    return _Tables()


def _sounds() -> dict[str, str]:
    """One private character a syllable without tone, z/zh, c/ch, s/sh and n/ng at the end taken as one."""
    from pypinyin import Style, lazy_pinyin

    codes: dict[str, int] = {}
    table = {}
    for code in range(0x4E00, 0x9FA6):
        syllable = lazy_pinyin(chr(code), style=Style.NORMAL)[0]
        for long, short in (("zh", "z"), ("ch", "c"), ("sh", "s")):
            if syllable.startswith(long):
                syllable = short + syllable[2:]
        if syllable.endswith(("ing", "eng")):
            syllable = syllable[:-1]
        table[chr(code)] = chr(codes.setdefault(syllable, 0xE000 + len(codes)))
    return table
