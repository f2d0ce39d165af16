#pragma once

// glog for the .cpp files of launch/ and nobody else: torch's headers define macros of the same
// names, which go first. Include this after every torch header.
#include <c10/util/Logging.h>

#undef CHECK
#undef CHECK_EQ
#undef CHECK_GE
#undef CHECK_GT
#undef CHECK_LE
#undef CHECK_LT
#undef CHECK_NE
#undef CHECK_NOTNULL
#undef CHECK_OP
#undef DCHECK
#undef DCHECK_EQ
#undef DCHECK_GE
#undef DCHECK_GT
#undef DCHECK_LE
#undef DCHECK_LT
#undef DCHECK_NE
#undef DCHECK_NOTNULL
#undef DLOG
#undef DLOG_IF
#undef DVLOG
#undef ERROR
#undef LOG
#undef LOG_EVERY_MS
#undef LOG_EVERY_N
#undef LOG_FIRST_N
#undef LOG_IF
#undef LOG_IS_ON
#undef PLOG
#undef PLOG_IF
#undef VLOG
#undef VLOG_EVERY_MS
#undef VLOG_EVERY_N
#undef VLOG_FIRST_N
#undef VLOG_IF
#undef VLOG_IS_ON

#include <glog/logging.h>
