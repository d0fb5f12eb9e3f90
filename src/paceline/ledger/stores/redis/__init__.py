"""The ledger on a Redis or Valkey server; see ledger.py."""

from paceline.ledger.stores.redis.address import address_of
from paceline.ledger.stores.redis.image import ServerImage
from paceline.ledger.stores.redis.ledger import RedisLedger
from paceline.ledger.stores.redis.requirements import Durability, examined
from paceline.ledger.stores.redis.view import RedisView

__all__ = ["Durability", "RedisLedger", "RedisView", "ServerImage", "address_of", "examined"]
