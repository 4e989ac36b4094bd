"""The words of the demo NLI data, grouped by meaning, with the facts (kind, opposite, country) behind the labels.

A star marks a word, or both words of a pair, as held out: no train row contains it, and every validation row contains a
starred word. A word is starred everywhere or nowhere, in all its forms. An underscore is a space. Nouns and verbs
follow the simple rules of `nli.py` or are listed in `IRREGULAR_PAST`. Words that need other rules (child, wolf, hug)
are left out, and so are words whose first letter misleads about "a" and "an" (hour, ukulele).
"""


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# --- nouns ------------------------------------------------------------------------------------------------------------

# Members of one kind exclude each other, and none belongs to two kinds. An armchair is also a chair, so it is left out.
KINDS = {
    "animal": words("dog cat horse cow goat rabbit lion tiger bear camel monkey owl fox* donkey* elephant* zebra*"),
    "vehicle": words("car bus truck tractor bicycle motorbike tram helicopter train* canoe*"),
    "tool": words("hammer saw drill spade rake axe wrench screwdriver chisel* trowel*"),
    "musical instrument": words("piano guitar violin trumpet flute drum harp cello* clarinet*"),
    "fruit": words("apple pear plum orange banana lemon peach mango* apricot*"),
    "vegetable": words("carrot onion potato cabbage turnip leek radish cauliflower* parsnip*"),
    "flower": words("rose tulip daisy lily orchid sunflower daffodil* carnation*"),
    "tree": words("oak pine birch willow elm maple poplar* cedar*"),
    "piece of clothing": words("coat shirt skirt hat scarf sweater dress glove* apron*"),
    "piece of furniture": words("chair bed sofa desk wardrobe bookcase bench* stool*"),
}

PEOPLE = words(
    "nurse doctor teacher farmer singer lawyer baker driver pilot painter writer dancer waiter sailor soldier student "
    "actor gardener butcher tailor judge priest clerk guard cook* plumber* dentist* carpenter* engineer* librarian*"
)
NAMES = words(
    "Anna Paul Maria Peter Laura Simon Julia Martin Clara David Helen Thomas Emma Robert Alice Daniel Sarah Henry "
    "Nina* Oscar* Ruth* Victor* Irene*"
)
RELATIVES = words("sister brother cousin friend uncle aunt")
ROOMS = words(
    "kitchen garden garage park library museum barn station market hotel office cellar* church* theatre* attic*"
)

# Cities of one country exclude each other, and so do the countries.
CITIES = {
    "France": words("Paris Lyon Marseille Bordeaux*"),
    "Germany": words("Berlin Munich Hamburg Cologne*"),
    "Italy": words("Rome Milan Naples Venice*"),
    "Spain": words("Madrid Barcelona Seville Valencia*"),
    "Japan": words("Tokyo Osaka Kyoto*"),
    "China": words("Beijing Shanghai Wuhan*"),
    "India": words("Delhi Mumbai Chennai*"),
    "Russia": words("Moscow Sochi Kazan*"),
    "Canada": words("Toronto Montreal Vancouver*"),
    "Australia": words("Sydney Melbourne Brisbane*"),
    "Poland*": words("Warsaw* Krakow*"),
    "Egypt*": words("Cairo* Luxor*"),
    "Greece*": words("Athens* Thessaloniki*"),
}

# --- adjectives -------------------------------------------------------------------------------------------------------

# Details, which say nothing about each other.
COLOURS = words("red blue green yellow white black brown* purple*")
TRAITS = words("tall young famous tired friendly lonely nervous* elderly*")

# For each list of nouns the opposites that apply to them. A thing is never both, but may be neither.
OPPOSITES = (
    (
        PEOPLE,
        words("rich/poor happy/sad strong/weak polite/rude awake/asleep healthy/sick married/single brave*/cowardly*"),
    ),
    (
        words("box bag parcel suitcase barrel* crate*"),
        words("heavy/light full/empty wet/dry clean/dirty cheap/expensive"),
    ),
    (words("soup tea rice bread* porridge*"), words("hot/cold salty*/sweet* fresh/stale")),
    (words("road bridge tunnel path* corridor*"), words("wide/narrow long/short safe/dangerous straight*/crooked*")),
    (words("door window gate drawer* cupboard*"), words("open/closed clean/dirty")),
    (words("river lake pond* canal*"), words("deep/shallow clean/dirty calm*/rough*")),
    (words("hall classroom lobby* bedroom*"), words("bright/dark tidy/messy quiet/noisy warm*/chilly*")),
)

# Relations, each with the one that says the same with the two sides exchanged.
CONVERSES = (
    (PEOPLE, words("is_taller_than/is_shorter_than is_older_than/is_younger_than is_richer_than/is_poorer_than")),
    (PEOPLE, words("was_born_before/was_born_after is_faster_than/is_slower_than is_stronger*_than/is_weaker*_than")),
    (
        words("bank school hospital bakery prison pharmacy* stadium*"),
        words("is_north_of/is_south_of is_east*_of/is_west*_of"),
    ),
    (words("lamp clock picture mirror shelf* poster*"), words("is_above/is_below is_higher*_than/is_lower*_than")),
)

# --- verbs ------------------------------------------------------------------------------------------------------------

# Done by one person to another, and perhaps the other way round too.
TO_PEOPLE = words(
    "praise help thank call visit follow push warn admire blame insult ignore "
    "comfort* interrupt* photograph* recognise*"
)
TO_THINGS = words("buy sell see find paint touch need notice inspect* steal* choose*")
ALONE = words("sing dance laugh cough smile sleep wave whistle shout yawn* sneeze* weep*")
TASKS = words(
    "lock_the_door pay_the_bill win_the_race finish_the_report clean_the_kitchen post_the_letter close_the_window "
    "feed_the_horses answer_the_question repair_the_roof find_the_key return_the_book paint_the_fence "
    "wash*_the_dishes deliver*_the_parcel cancel*_the_meeting"
)
IRREGULAR_PAST = {
    "buy": "bought", "sell": "sold", "see": "saw", "find": "found", "steal": "stole", "choose": "chose", "sing": "sang",
    "sleep": "slept", "weep": "wept", "pay": "paid", "win": "won", "feed": "fed",
}  # fmt: skip

# "X … to do it": X did it, X did not do it, nothing follows.
DID = words("managed_to remembered_to did_not_forget_to did_not_fail_to took_the_time_to bothered*_to")
DID_NOT = words("failed_to forgot_to refused_to did_not_manage_to did_not_remember_to neglected*_to declined*_to")
MAYBE_DID = words("hoped_to planned_to promised_to wanted_to was_asked_to did_not_promise_to intended*_to offered*_to")

# "X … that it is so": it is so, it is not so, nothing follows.
TRUE_THAT = words("knows_that noticed_that is_right_that has_proved_that discovered*_that")
FALSE_THAT = words("wrongly_believes_that falsely_claims_that is_wrong_to_think_that mistakenly*_thinks_that")
MAYBE_THAT = words("believes_that says_that hopes_that was_told_that suspects*_that assumes*_that")

ADVERBS = words("clearly still really certainly*")
