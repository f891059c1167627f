"""Everything that can lie on the table, by name."""

from agra.simulators.tabletop.furniture import CONTAINERS, PLATES
from agra.simulators.tabletop.objects import NOVEL, SEEN
from agra.simulators.tabletop.steamer import BUNS, LID, STEAMER

ITEMS = {item.name: item for item in (*SEEN, *NOVEL, *BUNS, LID)}
FURNITURE = {container.name: container for container in (*CONTAINERS, *PLATES, STEAMER)}
