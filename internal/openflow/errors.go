package openflow

import "fmt"

// ErrorMessage is what a switch answers to a message that it cannot obey (§7.5.4).
type ErrorMessage struct {
	XID          uint32 // of the message refused; [Marshal] takes its own argument instead
	Type, Code   uint16 // if Type is 0xffff, the code is Experimenter's
	Experimenter uint32
	Data         []byte // the beginning of the message refused; of a failed hello, a text
}

func (*ErrorMessage) messageType() uint8 { return typeError }

func (m *ErrorMessage) encode(e *encoder) {
	e.u16(m.Type)
	e.u16(m.Code)
	if m.Type == errorExperimenter {
		e.u32(m.Experimenter)
	}
	e.bytes(m.Data)
}

func decodeErrorMessage(d *decoder, xid uint32) *ErrorMessage {
	m := &ErrorMessage{XID: xid, Type: d.u16(), Code: d.u16()}
	if m.Type == errorExperimenter {
		m.Experimenter = d.u32()
	}
	m.Data = d.rest()
	return m
}

// Error tells the specification's name of the error, and the kind of message refused.
func (m *ErrorMessage) Error() string {
	s := "openflow: the switch refused "
	switch {
	case m.Type == errorHelloFailed:
		s += "the hello"
	case len(m.Data) >= 2:
		s += "a " + typeName(m.Data[1])
	default:
		s += "a message"
	}
	s += ": " + m.Name()
	if m.Type == errorHelloFailed && len(m.Data) > 0 {
		s += fmt.Sprintf(" (%q)", m.Data)
	}
	return s
}

// Name is the error's name in the specification or in Open vSwitch: "OFPBAC_BAD_OUT_PORT".
func (m *ErrorMessage) Name() string {
	if m.Type == errorExperimenter {
		if name, ok := niciraErrors[m.Code]; ok && m.Experimenter == experimenterNicira {
			return name
		}
		return fmt.Sprintf("error %d of experimenter %#x", m.Code, m.Experimenter)
	}
	if int(m.Type) < len(errorNames) {
		if t := errorNames[m.Type]; int(m.Code) < len(t.codes) {
			return t.prefix + t.codes[m.Code]
		}
	}
	return fmt.Sprintf("error type %d code %d", m.Type, m.Code)
}

const (
	errorHelloFailed  = 0
	errorExperimenter = 0xffff
)

// errorNames are the standard errors, by type and code.
var errorNames = [...]struct {
	prefix string
	codes  []string
}{
	0: {"OFPHFC_", []string{"INCOMPATIBLE", "EPERM"}},
	1: {"OFPBRC_", []string{
		"BAD_VERSION", "BAD_TYPE", "BAD_MULTIPART", "BAD_EXPERIMENTER", "BAD_EXP_TYPE", "EPERM", "BAD_LEN",
		"BUFFER_EMPTY", "BUFFER_UNKNOWN", "BAD_TABLE_ID", "IS_SLAVE", "BAD_PORT", "BAD_PACKET",
		"MULTIPART_BUFFER_OVERFLOW", "MULTIPART_REQUEST_TIMEOUT", "MULTIPART_REPLY_TIMEOUT", "MULTIPART_BAD_SCHED",
		"PIPELINE_FIELDS_ONLY", "UNKNOWN",
	}},
	2: {"OFPBAC_", []string{
		"BAD_TYPE", "BAD_LEN", "BAD_EXPERIMENTER", "BAD_EXP_TYPE", "BAD_OUT_PORT", "BAD_ARGUMENT", "EPERM", "TOO_MANY",
		"BAD_QUEUE", "BAD_OUT_GROUP", "MATCH_INCONSISTENT", "UNSUPPORTED_ORDER", "BAD_TAG", "BAD_SET_TYPE",
		"BAD_SET_LEN", "BAD_SET_ARGUMENT", "BAD_SET_MASK", "BAD_METER",
	}},
	3: {"OFPBIC_", []string{
		"UNKNOWN_INST", "UNSUP_INST", "BAD_TABLE_ID", "UNSUP_METADATA", "UNSUP_METADATA_MASK", "BAD_EXPERIMENTER",
		"BAD_EXP_TYPE", "BAD_LEN", "EPERM", "DUP_INST",
	}},
	4: {"OFPBMC_", []string{
		"BAD_TYPE", "BAD_LEN", "BAD_TAG", "BAD_DL_ADDR_MASK", "BAD_NW_ADDR_MASK", "BAD_WILDCARDS", "BAD_FIELD",
		"BAD_VALUE", "BAD_MASK", "BAD_PREREQ", "DUP_FIELD", "EPERM",
	}},
	5: {"OFPFMFC_", []string{
		"UNKNOWN", "TABLE_FULL", "BAD_TABLE_ID", "OVERLAP", "EPERM", "BAD_TIMEOUT", "BAD_COMMAND", "BAD_FLAGS",
		"CANT_SYNC", "BAD_PRIORITY", "IS_SYNC",
	}},
	6: {"OFPGMFC_", []string{
		"GROUP_EXISTS", "INVALID_GROUP", "WEIGHT_UNSUPPORTED", "OUT_OF_GROUPS", "OUT_OF_BUCKETS",
		"CHAINING_UNSUPPORTED", "WATCH_UNSUPPORTED", "LOOP", "UNKNOWN_GROUP", "CHAINED_GROUP", "BAD_TYPE",
		"BAD_COMMAND", "BAD_BUCKET", "BAD_WATCH", "EPERM", "UNKNOWN_BUCKET", "BUCKET_EXISTS",
	}},
	7:  {"OFPPMFC_", []string{"BAD_PORT", "BAD_HW_ADDR", "BAD_CONFIG", "BAD_ADVERTISE", "EPERM"}},
	8:  {"OFPTMFC_", []string{"BAD_TABLE", "BAD_CONFIG", "EPERM"}},
	9:  {"OFPQOFC_", []string{"BAD_PORT", "BAD_QUEUE", "EPERM"}},
	10: {"OFPSCFC_", []string{"BAD_FLAGS", "BAD_LEN", "EPERM"}},
	11: {"OFPRRFC_", []string{"STALE", "UNSUP", "BAD_ROLE", "ID_UNSUP", "ID_IN_USE"}},
	12: {"OFPMMFC_", []string{
		"UNKNOWN", "METER_EXISTS", "INVALID_METER", "UNKNOWN_METER", "BAD_COMMAND", "BAD_FLAGS", "BAD_RATE",
		"BAD_BURST", "BAD_BAND", "BAD_BAND_VALUE", "OUT_OF_METERS", "OUT_OF_BANDS",
	}},
	13: {"OFPTFFC_", []string{
		"BAD_TABLE", "BAD_METADATA", "UNKNOWN_2", "UNKNOWN_3", "UNKNOWN_4", "EPERM", "BAD_CAPA", "BAD_MAX_ENT",
		"BAD_FEATURES", "BAD_COMMAND", "TOO_MANY",
	}},
	14: {"OFPBPC_", []string{
		"BAD_TYPE", "BAD_LEN", "BAD_VALUE", "TOO_MANY", "DUP_TYPE", "BAD_EXPERIMENTER", "BAD_EXP_TYPE",
		"BAD_EXP_VALUE", "EPERM",
	}},
	15: {"OFPACFC_", []string{"INVALID", "UNSUPPORTED", "EPERM"}},
	16: {"OFPMOFC_", []string{
		"UNKNOWN", "MONITOR_EXISTS", "INVALID_MONITOR", "UNKNOWN_MONITOR", "BAD_COMMAND", "BAD_FLAGS", "BAD_TABLE_ID",
		"BAD_OUT",
	}},
	17: {"OFPBFC_", []string{
		"UNKNOWN", "EPERM", "BAD_ID", "BUNDLE_EXIST", "BUNDLE_CLOSED", "OUT_OF_BUNDLES", "BAD_TYPE", "BAD_FLAGS",
		"MSG_BAD_LEN", "MSG_BAD_XID", "MSG_UNSUP", "MSG_CONFLICT", "MSG_TOO_MANY", "MSG_FAILED", "TIMEOUT",
		"BUNDLE_IN_PROGRESS", "SCHED_NOT_SUPPORTED", "SCHED_FUTURE", "SCHED_PAST",
	}},
}

// niciraErrors are Open vSwitch's own.
var niciraErrors = map[uint16]string{
	2:  "NXBRC_NXM_INVALID",
	3:  "NXBRC_NXM_BAD_TYPE",
	4:  "NXBRC_MUST_BE_ZERO",
	10: "NXBRC_UNENCODABLE_ERROR",
	11: "NXBAC_MUST_BE_ZERO",
	12: "NXFMFC_HARDWARE",
	13: "NXFMFC_BAD_TABLE_ID",
	15: "NXBAC_BAD_CONJUNCTION",
	22: "OFPBFC_BAD_VERSION",
	34: "NXR_NOT_SUPPORTED",
	35: "NXR_STALE",
	37: "NXFMFC_INVALID_TLV_FIELD",
	42: "NXBAC_CT_DATAPATH_SUPPORT",
	43: "NXBMC_CT_DATAPATH_SUPPORT",
}
