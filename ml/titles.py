"""Made-up titles: readable, varied, and unlike any real work as far as chance allows."""

import numpy as np

# Each category with nouns of its own, so that a title hints at it.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "Adventure": ("Voyage", "Summit", "Compass", "Expedition", "Map", "Caravan", "Horizon", "Crossing"),
    "Comedy": ("Landlord", "Wedding", "Pancake", "Neighbour", "Holiday", "Goldfish", "Umbrella", "Dinner"),
    "Crime": ("Alibi", "Witness", "Ransom", "Evidence", "Safe", "Inspector", "Verdict", "Forger"),
    "Documentary": ("Glacier", "Orchard", "Railway", "Lighthouse", "Workshop", "Archive", "Harvest", "Estuary"),
    "Drama": ("Daughter", "Inheritance", "Promise", "Winter", "Stranger", "Letter", "Silence", "Garden"),
    "Family": ("Treehouse", "Puppy", "Lantern", "Grandmother", "Kite", "Snowman", "Picnic", "Attic"),
    "Fantasy": ("Dragon", "Kingdom", "Spell", "Throne", "Oracle", "Sorcerer", "Crown", "Rune"),
    "History": ("Empire", "Regiment", "Cathedral", "Treaty", "Queen", "Siege", "Merchant", "Parchment"),
    "Horror": ("Cellar", "Whisper", "Graveyard", "Mirror", "Visitor", "Fog", "Doll", "Corridor"),
    "Music": ("Serenade", "Drummer", "Encore", "Melody", "Violin", "Chorus", "Ballad", "Jukebox"),
    "Mystery": ("Cipher", "Key", "Shadow", "Riddle", "Manuscript", "Clue", "Locket", "Secret"),
    "Nature": ("Heron", "Forest", "Wolf", "River", "Meadow", "Reef", "Falcon", "Tide"),
    "Romance": ("Kiss", "Summer", "Heart", "Rendezvous", "Bouquet", "Waltz", "Vow", "Postcard"),
    "Science Fiction": ("Orbit", "Android", "Colony", "Signal", "Nebula", "Starship", "Clone", "Gravity"),
    "Sport": ("Champion", "Final", "Coach", "Marathon", "Underdog", "Ring", "Season", "Goalkeeper"),
    "Thriller": ("Hostage", "Deadline", "Code", "Double", "Escape", "Target", "Informant", "Trap"),
    "Travel": ("Island", "Passport", "Ferry", "Monsoon", "Bazaar", "Highway", "Hostel", "Suitcase"),
    "Western": ("Sheriff", "Canyon", "Saloon", "Outlaw", "Prairie", "Stagecoach", "Spur", "Rancher"),
}


def _words(text: str) -> list[str]:
    return [" ".join(word.split()) for word in text.split(",")]


_ADJECTIVES = _words("""
    Amber, Ancient, Bitter, Blue, Borrowed, Brave, Broken, Burning, Clever, Cold, Copper, Crimson, Distant,
    Drifting, Electric, Empty, Endless, Faithful, Fallen, Final, First, Forgotten, Fragile, Frozen, Gentle, Golden,
    Hidden, Hollow, Humble, Invisible, Iron, Last, Little, Lonely, Long, Lost, Lucky, Midnight, Moonlit, Narrow,
    Northern, Old, Paper, Patient, Perfect, Quiet, Restless, Scarlet, Second, Secret, Seventh, Silent, Silver,
    Sleeping, Slow, Southern, Stolen, Sudden, Tender, Thirteenth, Tiny, Unfinished, Unlikely, Unspoken, Velvet,
    Violet, Wandering, White, Wild, Wooden
""")
_PLACES = _words("""
    Alder Bay, Ashford, Birch Hill, Blackwater, Cedar Falls, Coldharbour, Copper Creek, Dunmore, Eastwick, Elmstead,
    Fairhaven, Fern Hollow, Greyport, Hazelmere, Highmoor, Ivywood, Juniper Street, Kestrel Point, Larkspur, Lowell
    Pier, Marlow, Mistral, Northgate, Oakhurst, Pinewater, Quarry Lane, Ravensworth, Redcliff, Saltmarsh,
    Silverdale, Stonebridge, Thornfield, Umberley, Valley Nine, Westering, Willow End, Winterbourne, Yarrow, Zephyr
    Cove
""")
_NAMES = _words("""
    Ada, Amir, Anouk, Bruno, Carmen, Chidi, Clara, Dara, Eben, Elif, Esther, Farah, Felix, Greta, Hana, Hugo, Ines,
    Ivo, Jonas, Juno, Kaito, Lena, Leo, Lucia, Maeve, Malik, Mara, Mina, Nadia, Nils, Noor, Odile, Oscar, Pavel,
    Petra, Quentin, Rafael, Rosa, Ruth, Sami, Selma, Tariq, Tess, Theo, Uma, Vera, Viktor, Wanda, Yara, Zadie, Zeno
""")
_NUMERALS = ("", " II", " III", " IV", " V", " VI", " VII", " VIII", " IX", " X")


def make_titles(categories: list[str], generator: np.random.Generator) -> list[str]:
    """Return a title for each category given, no two alike."""
    size = len(categories)
    patterns = generator.integers(0, 8, size).tolist()
    draws = generator.integers(0, 1 << 31, (size, 4)).tolist()
    seen: dict[str, int] = {}
    titles = []
    for category, pattern, (one, two, three, four) in zip(categories, patterns, draws, strict=True):
        nouns = CATEGORIES[category]
        noun, other = nouns[one % len(nouns)], nouns[two % len(nouns)]
        adjective, place, name = (
            _ADJECTIVES[three % len(_ADJECTIVES)],
            _PLACES[four % len(_PLACES)],
            _NAMES[two % len(_NAMES)],
        )
        title = (
            f"The {adjective} {noun}",
            f"The {noun} of {place}",
            f"{name} and the {noun}",
            f"{adjective} {noun}",
            f"{name}'s {adjective} {noun}",
            f"A {noun} in {place}" if noun[0] not in "AEIOU" else f"An {noun} in {place}",
            f"The {noun} and the {other}" if noun != other else f"The Other {noun}",
            f"{adjective} {noun} at {place}",
        )[pattern]
        number = seen.get(title, 0)
        seen[title] = number + 1
        titles.append(title + (_NUMERALS[number] if number < len(_NUMERALS) else f", Part {number + 1}"))
    return titles
