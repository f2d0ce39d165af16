#pragma once

#include <nlohmann/json.hpp>

#include "policy/attention/audit.h"

namespace drrl {

/// --audit_rows: counts over all levels, and quantiles over units of the audit.
void add_audit(const AuditReport& report, nlohmann::ordered_json& json);
void print_audit(const nlohmann::ordered_json& json);

}  // namespace drrl
