"""All items and furniture by name."""

from agra.simulators.tabletop.models.furniture import CONTAINERS, PLATES
from agra.simulators.tabletop.models.items import NOVEL, SEEN
from agra.simulators.tabletop.models.steamer import BUNS, LID, STEAMER

ITEMS = {item.name: item for item in (*SEEN, *NOVEL, *BUNS, LID)}
FURNITURE = {container.name: container for container in (*CONTAINERS, *PLATES, STEAMER)}
