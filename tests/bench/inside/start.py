"""CPU seconds to import the baked service and to build its app, as a JSON object."""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))
bare = time.process_time()
from app import create_app  # noqa: E402

imported = time.process_time()
create_app()
built = time.process_time()
used = os.times()
found = {"import": imported - bare, "create_app": built - imported, "both": built - bare}
print(json.dumps(found | {"process": used.user + used.system}))
