"""${message}"""

% if any("_enum_value" in str(text) for text in context.kwargs.values()):
import alembic_postgresql_enum  # noqa: F401  # op.add_enum_value(), op.sync_enum_values()
% endif
import sqlalchemy as sa
from alembic import op
${imports if imports else ""}

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
% for name, body in sorted(context.kwargs.items(), reverse=True):
% if name.endswith(("_upgrades", "_downgrades")) and body.strip() != "pass":


def ${"_".join(reversed(name.removesuffix("s").rsplit("_", 1)))}() -> None:
    ${body}
% endif
% endfor
