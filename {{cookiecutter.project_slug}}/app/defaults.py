"""Your answers when this project was generated. No other Python file has them."""

SERVICE_NAME = "{{ cookiecutter.project_slug }}"
SERVICE_TITLE = {{ cookiecutter.__project_name_python }}
SERVICE_DESCRIPTION = {{ cookiecutter.__description_python }}

# Override with DB_MAX_CONNECTIONS and APP_INSTANCES.
MAX_CONNECTIONS = {{ cookiecutter.postgres_max_connections }}
INSTANCES = {{ cookiecutter.app_instances }}
