#include "emaudit.hpp"

const char *linked_version();

const char *linked_version() { return emaudit::load() ? emaudit::version() : "none"; }
